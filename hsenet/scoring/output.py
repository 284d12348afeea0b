"""What a run leaves behind: results with intervals, tables, and the entries of a model card."""

import json
import math
from collections.abc import Callable, Hashable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hsenet.metrics.bootstrap import confidence_intervals
from hsenet.metrics.table import Result, results_table
from hsenet.metrics.tally import Tally


# The columns of the printed tables; metrics.json has every score.
HEADLINES = (
    "image_to_text_R@1",
    "image_to_text_R@5",
    "image_to_text_R@10",
    "image_to_text_mrr",
    "text_to_image_R@1",
    "text_to_image_R@5",
    "text_to_image_R@10",
    "text_to_image_mrr",
    "mean_jaccard@1",
    "mean_jaccard@5",
    "mean_jaccard@10",
    "chance_jaccard",
    "findings_f1_macro",
    "findings_f1_micro",
    "findings_f1_weighted",
    "crg",
    "bleu-13a.bleu_4",
    "bleu-coco.bleu_1",
    "bleu-coco.bleu_4",
    "rouge-l.rouge_l",
    "meteor-nltk.meteor",
    "meteor-nltk-stem.meteor",
    "bertscore_f1",
    "ratescore",
    "radgraph_partial",
    "green",
    "unique_texts",
    "self_bleu_4",
    "accuracy",
    "set_accuracy",
    "set_f1",
    "major_class_accuracy",
    "option_accuracy",
    "option_chance",
    "unreadable",
)
BY_GROUP = ("accuracy", "set_accuracy", "option_accuracy")  # split by type and anatomy
# Of published tables: printed apart, so that nobody takes them for the others.
PUBLISHED = (
    "precision-hsenet.precision_1",
    "precision-hsenet.precision_4",
    "bleu-m3d.mean_bleu_1",
    "major_class_hsenet",
    "ct_clip_map@1",
    "ct_clip_map@5",
    "ct_clip_map@10",
    "ct_clip_map@50",
)
# Tasks of the Hub; it has none for retrieval.
TASK_TYPES = {"retrieval": "feature-extraction", "report": "image-text-to-text", "vqa": "visual-question-answering"}
Scorer = Callable[[str, Sequence[Tally]], list[Result]]  # (system, tallies) -> results with intervals
PACKAGES = ("hsenet", "torch", "transformers", "datasets", "sacrebleu", "rouge-score", "nltk", "numpy")


def results_of(
    system: str, tallies: Sequence[Tally], patients: Sequence[Hashable], num_resamples: int, seed: int
) -> list[Result]:
    """Every score of the tallies with its interval; without one where there are no two patients."""
    results = []
    for tally in tallies:
        intervals: dict[str, tuple[float, float]] = {}
        if num_resamples and len(set(patients)) > 1:
            intervals = confidence_intervals(tally, patients, num_resamples=num_resamples, seed=seed)
        name_of = _qualified(tally.protocol)
        for name, value in tally.scores().items():
            low, high = intervals.get(name, (None, None))
            results.append(Result(system, name_of(name), value, tally.protocol, low, high))
    return results


def scorer_of(patients: Sequence[Hashable], num_resamples: int, seed: int) -> Scorer:
    """`results_of` for items of these patients."""
    return lambda system, tallies: results_of(system, tallies, patients, num_resamples, seed)


def plain_results(system: str, scores: dict[str, float], protocol: str) -> list[Result]:
    """Scores that have no interval."""
    return [Result(system, name, value, protocol) for name, value in scores.items()]


def tables(task: str, results: Sequence[Result]) -> str:
    """The task's headlines, its accuracies by group, and apart from them what exists for published tables only."""
    of_groups = tuple(f"{name}[" for name in BY_GROUP)
    groups = tuple(dict.fromkeys(result.score for result in results if result.score.startswith(of_groups)))
    titles = {
        task: HEADLINES,
        f"{task}, by type and anatomy": groups,
        f"{task}, as published elsewhere (don't rank by these)": PUBLISHED,
    }
    order = list(dict.fromkeys(result.system for result in results))
    parts = []
    for title, names in titles.items():
        shown = sorted((result for result in results if result.score in names), key=lambda r: names.index(r.score))
        if shown:
            parts.append(f"### {title}\n\n{results_table(sorted(shown, key=lambda r: order.index(r.system)))}")
    return "\n\n".join(parts)


def model_index(
    name: str, results: dict[str, list[Result]], dataset: str, split: str, revision: str | None = None
) -> list[dict[str, Any]]:
    """
    The card's `model-index` of one model: its headline scores, each with protocol and interval.

    Args:
        results: task -> the results of this model alone.
    """
    entries = [
        EvalResult(
            task_type=TASK_TYPES[task.split()[-1]],
            task_name=task,
            dataset_type=dataset,
            dataset_name=Path(dataset).name,
            dataset_split=split,
            dataset_revision=revision,
            metric_type=result.score,
            metric_name=result.score,
            metric_config=result.protocol,
            metric_value=round(result.value, 4),
            metric_args=None if result.low is None else {"interval_95": [round(result.low, 4), round(result.high, 4)]},
        )
        for task, of_task in results.items()
        for result in of_task
        if result.score in HEADLINES and math.isfinite(result.value)
    ]
    return eval_results_to_model_index(name, entries) if entries else []


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def write_json(path: Path, value: Any) -> None:
    """JSON that every reader takes: what is not a number becomes null."""
    path.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _qualified(protocol: str) -> Callable[[str], str]:
    """Overlap scores carry their protocol in the name: there are three `bleu_4`."""
    name = protocol.split("/")[0]
    return (lambda score: f"{name}.{score}") if name.startswith(("bleu", "rouge", "meteor", "precision")) else str
