"""The model card's section on training, from what the run's directory records."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hsenet.run_record import CURVES, read_record


BEGIN, END = "<!-- training: written by the run -->", "<!-- end of training -->"
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
        *_table(("setting", "value"), [(name, settings[name]) for name in _SHOWN]),
        "",
        *_results(log, settings),
        *_environments(starts),
        "",
        f"![Curves]({CURVES})",
        "",
        "All settings are in `run_config.yaml`, all figures in `log.jsonl`.",
    ]
    return "\n".join(lines)


def write_card(output_dir: str | Path) -> None:
    """The section into the directory's README.md: in place of an earlier run's, or into a new card."""
    path = Path(output_dir) / "README.md"
    section = f"{BEGIN}\n{training_section(output_dir)}\n{END}"
    if path.exists():
        card = ModelCard.load(path)
        card.text, replaced = re.subn(f"{BEGIN}.*?{END}", lambda _: section, card.text, flags=re.DOTALL)
        if not replaced:
            card.text = f"{card.text.rstrip()}\n\n{section}\n"
    else:
        data = ModelCardData(library_name="transformers", tags=["hsenet", "computed-tomography"])
        title = "# HSENet\n\nA 3D CT vision-language model. Not a medical device: for research only."
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{section}\n")
    card.save(path)


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]


def _results(log: list[dict[str, float]], settings: dict[str, Any]) -> list[str]:
    evaluations = [row for row in log if any(name.startswith("eval_") for name in row)]
    if not evaluations:
        return []
    names = [name for name in evaluations[-1] if name != "step"]
    split = settings.get("data", {}).get("eval_split")
    said = [f"While training, on the split `{split}`, which is not that of the final evaluation:", ""] if split else []
    # The last ten: the rest is in the log.
    rows = [(row["step"], *(f"{row[name]:.4g}" for name in names)) for row in evaluations[-10:]]
    return [*said, *_table(("step", *(name.removeprefix("eval_") for name in names)), rows), ""]


def _environments(starts: list[dict[str, Any]]) -> list[str]:
    lines = []
    for start in starts:
        packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items() if version)
        changes = " with uncommitted changes" if start.get("git_changes") else ""
        revision = f"; source at `{start['git_revision']}`{changes}" if start.get("git_revision") else ""
        lines.append(
            f"- From step {start['from_step']}: {start['num_processes']} process(es) on {start['device']}, "
            f"{start['platform']}, Python {start['python']}, {packages}{revision}"
        )
    return lines
