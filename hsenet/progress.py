"""Where a run stands: its step, its best evaluation so far, and whether it has waited long enough for a better one."""

from dataclasses import dataclass

from hsenet.arguments import TrainingArguments


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    evaluations_without_improvement: int = 0

    def take(self, metrics: dict[str, float], arguments: TrainingArguments) -> bool:
        """Whether an evaluation at this step is the best one yet."""
        name = arguments.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:
            raise ValueError(f"metric_for_best_model is {name!r}; the evaluation gives {', '.join(sorted(metrics))}.")
        greater = arguments.greater_is_better
        sign = 1 if (not name.endswith("loss") if greater is None else greater) else -1
        gain = None if self.best_metric is None else sign * (metrics[name] - self.best_metric)
        # The threshold is for patience and for the best checkpoint alike; NaN is never better.
        is_better = metrics[name] == metrics[name] if gain is None else gain > arguments.early_stopping_threshold
        if is_better:
            self.best_step, self.best_metric = self.step, metrics[name]
        self.evaluations_without_improvement = 0 if is_better else self.evaluations_without_improvement + 1
        return is_better

    def is_exhausted(self, arguments: TrainingArguments) -> bool:
        return 0 < arguments.early_stopping_patience <= self.evaluations_without_improvement
