"""The model card's section on training, from what the run's directory records."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hsenet.card_marks import put_sections, read_card, update_card
from hsenet.metrics.table import as_cell, plain_table
from hsenet.run_record import CURVES, read_record, write_whole


_SHOWN = (
    "learning_rate",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "warmup_ratio",
    "batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
    "seed",
)


def training_section(output_dir: str | Path) -> str:
    """
    Markdown from "## Training" on, of a run that has ended.

    Raises:
        FileNotFoundError: the folder is no run's directory.
    """
    record = read_record(output_dir)
    settings, data, starts, log = (record[name] for name in ("settings", "data", "starts", "log"))
    rows_per_step = settings["num_processes"] * settings["batch_size"] * settings["gradient_accumulation_steps"]
    last = max((row["step"] for row in log), default=0)
    volumes = f" with {data['num_volumes']} scans" if "num_volumes" in data else ""
    lines = [
        "## Training",
        "",
        f"{last} steps of {rows_per_step} rows, cosine schedule with warm-up, AdamW, on {data['num_rows']} "
        f"rows{volumes} (SHA-256 of rows and voxels: `{data['sha256']}`).",
        "",
        plain_table(("setting", "value"), [(name, settings[name]) for name in _SHOWN]),
        "",
        *_results(log, settings),
        "### Hardware and time",
        "",
        *_environments(starts),
        "",
        f"![Curves]({CURVES})",
        "",
        "All settings are in `run_config.yaml`, all figures in `log.jsonl`.",
    ]
    return "\n".join(lines)


def write_card(output_dir: str | Path) -> None:
    """
    The section into the directory's README.md: in place of an earlier run's, or into a new card.

    A run writes it when it ends, also one that was interrupted and has no model yet; `write_model_card` adds the rest.
    """
    path = Path(output_dir) / "README.md"
    sections = {"training": training_section(output_dir)}
    card = read_card(path, ModelCard)
    if card is not None:
        card.text = put_sections(card.text, sections)
        return write_whole(path, str(card))
    title = "# HSENet\n\nA 3D CT vision-language model. **Not a medical device.** For research only."
    metadata = {"library_name": "transformers", "tags": ["hsenet", "computed-tomography"]}
    write_whole(path, update_card(None, metadata, {"summary": title, **sections}))


def _results(log: list[dict[str, float]], settings: dict[str, Any]) -> list[str]:
    evaluations = [row for row in log if any(name.startswith("eval_") for name in row)]
    if not evaluations:
        return []
    names = [name for name in evaluations[-1] if name != "step"]
    split = settings.get("data", {}).get("eval_split")
    said = (
        [f"While training, on the split `{as_cell(split)}`, which is not that of the final evaluation:", ""]
        if split
        else []
    )
    # The last ten: the rest is in the log.
    rows = [(row["step"], *(f"{row[name]:.4g}" for name in names)) for row in evaluations[-10:]]
    return [*said, plain_table(("step", *(name.removeprefix("eval_") for name in names)), rows), ""]


def _environments(starts: list[dict[str, Any]]) -> list[str]:
    lines = []
    for start in starts:
        packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items() if version)
        changes = " with uncommitted changes" if start.get("git_changes") else ""
        revision = f"; source at `{start['git_revision']}`{changes}" if start.get("git_revision") else ""
        lines.append(
            f"- From step {start['from_step']}: {_duration(start)}{start['num_processes']} process(es) on "
            f"{_device(start)}, {start['platform']}, Python {start['python']}, {packages}{revision}"
        )
    return lines


def _device(start: dict[str, Any]) -> str:
    threads = f" with {start['threads']} thread(s)" if start["device"] == "cpu" and "threads" in start else ""
    return f"{start['device']}{threads}"


def _duration(start: dict[str, Any]) -> str:
    """How long these steps took, if they came to an end that could be written down."""
    if "seconds" not in start:
        return ""
    hours, minutes = divmod(round(start["seconds"] / 60), 60)
    return f"{hours} h {minutes} min, " if hours else f"{start['seconds'] / 60:.1f} min, "
