"""What a continued run must have in common with the one that wrote the checkpoint, and what may change."""

import json
from typing import Any

from hsenet.arguments import TrainingArguments
from hsenet.checkpoints import CheckpointError


# Where things are, how they are computed and reported, and until when: nothing that decides what a step does.
FREE = {
    "output_dir",
    "cache_dir",
    "dataset",  # the rows themselves are compared
    "train_split",
    "max_train_rows",
    "eval_split",
    "test_splits",
    "max_eval_rows",
    "num_workers",
    "loader_workers",
    "max_failures",
    "cache_only",
    "gradient_checkpointing",
    "torch_compile",
    "chunk_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "resume",
    "max_shard_size",
    "report_to",
    "push_to_hub",
    "hub_private",
    "load_best_model_at_end",
    "early_stopping_patience",
    "num_train_epochs",  # the number of steps is compared, which the schedule needs
    "max_steps",
}
LAYOUT = ("num_processes", "batch_size", "gradient_accumulation_steps")


def kept_settings(
    arguments: TrainingArguments, total_steps: int, num_processes: int, sampler: Any, data: dict[str, Any]
) -> dict[str, Any]:
    """Flat, as JSON has it: all that decides what each step computes, and how its rows are shared out."""
    # Not where they come from: the rows and the weights themselves are compared.
    settings = {name: value for name, value in arguments.settings.items() if name != "sources"}
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    given = {**settings, **{name: value for group in groups.values() for name, value in group.items()}}
    kept = {name: value for name, value in given.items() if name not in FREE | set(groups)}
    kept["num_processes"] = num_processes
    kept["total_steps"] = total_steps
    kept["training_rows"] = data
    # Such a sampler puts rows in order batch by batch.
    kept["rows_ordered_by_batches_of"] = getattr(sampler, "batch_size", None)
    return json.loads(json.dumps(kept))


def refuse_other_run(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """
    Args:
        stored: what [`kept_settings`] gave for the run of the checkpoint, and its hash of frozen weights.
        current: the same of this run.

    Raises:
        CheckpointError: this run would not be the same one continued.
    """
    names = (set(stored) | set(current)) - set(LAYOUT)
    if changed := sorted(name for name in names if stored.get(name) != current.get(name)):
        raise CheckpointError(
            f"The checkpoint was written with other settings of {', '.join(changed)}: use them, or another "
            "output_dir, or delete the folder `checkpoints` to start anew."
        )
    if _rows_per_step(stored) != _rows_per_step(current):
        raise CheckpointError(
            f"The checkpoint's steps have {_layout(stored)} = {_rows_per_step(stored)} rows, this run's "
            f"{_layout(current)} = {_rows_per_step(current)}: a run can continue on other processes only with the "
            "same rows in each step. Change batch_size or gradient_accumulation_steps."
        )


def describe_other_layout(stored: dict[str, Any], current: dict[str, Any]) -> str:
    """What stays equal and what does not, if the rows of a step are shared out in another way; else nothing."""
    if all(stored[name] == current[name] for name in LAYOUT):
        return ""
    text = (
        f" It was written by {_layout(stored)} rows a step, this is {_layout(current)}: each step has the same rows "
        "in the same order, moved alike. Not equal are the rounding of sums, dropout, and which sections and "
        "sentences rewrite_reports keeps, which is drawn for a batch."
    )
    if _compared(stored) != _compared(current):
        text += (
            f" A contrastive loss compares {_compared(current)} rows now, {_compared(stored)} before, which changes "
            "what it says."
        )
    return text


def _layout(settings: dict[str, Any]) -> str:
    processes, rows, accumulation = (settings[name] for name in LAYOUT)
    return f"{processes} process(es) x {rows} x {accumulation} accumulation step(s)"


def _rows_per_step(settings: dict[str, Any]) -> int:
    return _compared(settings) * settings["gradient_accumulation_steps"]


def _compared(settings: dict[str, Any]) -> int:
    return settings["num_processes"] * settings["batch_size"]
