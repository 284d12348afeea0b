# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What train/evaluate.py found about one model, as its card says it: entries, tables, and what the figures admit."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModel

from hsenet.card_marks import read_card
from hsenet.digests import model_digest
from hsenet.metrics.table import as_cell, plain_table
from hsenet.scoring.output import HEADLINES
from hsenet.sources import HUB_ID


OWN, OTHER, BLANK = "model", "model, another patient's scan", "model, blank scan"  # systems of hsenet/scoring/text.py
LOCAL = "a local dataset"
NO_FLOOR = ("true reports",)
DIVERSITY = ("unique_texts", "self_bleu_4", "unreadable")  # more is not better
GROUPS = ("accuracy[", "option_accuracy[")  # by type and anatomy
SETTINGS = ("report_fields", "report_prompt", "max_rows", "max_new_tokens", "temperature", "seed")


@dataclass
class Evaluation:
    """
    Args:
        results: for the card's `model-index`.
        markdown: the section's text, below its heading.
    """

    results: list[EvalResult]
    markdown: str


def read_evaluation(folder: Path, output_dir: Path) -> Evaluation:
    """
    Args:
        folder: a saved model.
        output_dir: of the evaluation.

    Raises:
        FileNotFoundError: there are no results in `output_dir`.
        ValueError: the results are of other weights.
    """
    path = output_dir / "metrics.json"
    if not path.exists():
        raise FileNotFoundError("Expected the output_dir of train/evaluate.py: there is no metrics.json in it.")
    metrics = json.loads(path.read_text())
    sha = model_digest(AutoModel.from_pretrained(folder))
    role = next((role for role, model in metrics["models"].items() if model["sha256"] == sha), None)
    if role is None:
        raise ValueError(
            f"The evaluation is of other weights ({', '.join(metrics['models'])}): none of them has the SHA-256 "
            f"{sha[:12]}... of the model in this folder. Evaluate this model, or take its evaluation."
        )
    own = ("report", "vqa") if role == OWN else (role,)  # first words of the tasks' names
    tasks = {task: rows for task, rows in metrics["results"].items() if task.split()[0] in own}
    dataset = _dataset_name(metrics)
    results = _eval_results(metrics, role, dataset)
    verdict = [metrics["verdict"]["text"]] if role == OWN and "verdict" in metrics else []
    parts = [_introduction(metrics, dataset), *verdict]
    parts += [f"### {as_cell(task)}\n\n{_table(rows, role)}" for task, rows in tasks.items()]
    settings = {name: metrics["settings"].get(name) for name in SETTINGS}
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    parts.append(f"Settings: `{json.dumps(settings)}`. Versions: {versions}. SHA-256 of what was scored: `{sha}`.")
    if weaknesses := _weaknesses(tasks, role, metrics["settings"]):
        parts.append("### What these figures admit\n\n" + "\n".join(f"- {weakness}" for weakness in weaknesses))
    return Evaluation(results, "\n\n".join(parts))


def _dataset_name(metrics: dict[str, Any]) -> str:
    folder = Path(metrics["dataset"])
    if not folder.is_dir():
        return metrics["dataset"] if HUB_ID.fullmatch(metrics["dataset"]) else LOCAL
    card = read_card(folder / "README.md", DatasetCard)
    return (card.data.get("pretty_name") if card is not None else None) or LOCAL


def _eval_results(metrics: dict[str, Any], role: str, dataset: str) -> list[EvalResult]:
    """The headline scores, each with its interval and, beside it, what the best floor reaches."""
    if not metrics["model_index"][role]:
        return []
    _, results = model_index_to_eval_results(metrics["model_index"][role])
    for result in results:
        result.dataset_name = dataset
        if result.dataset_type != metrics["dataset"] or not HUB_ID.fullmatch(dataset):  # a folder's name
            result.dataset_type = re.sub(r"[^\w.-]+", "-", dataset, flags=re.ASCII).strip("-").lower() or "local"
        rows = metrics["results"][result.task_name]
        if (floor := _best_floor(rows, result.metric_name, [role])) is not None:
            floors = {"best_floor": round(floor["value"], 4), "best_floor_is": floor["system"]}
            result.metric_args = (result.metric_args or {}) | floors
    return results


def _introduction(metrics: dict[str, Any], dataset: str) -> str:
    questions = f" and {metrics['num_questions']} questions" if metrics["num_questions"] else ""
    resamples = metrics["settings"]["num_resamples"]
    intervals = f"95 % intervals by a bootstrap over patients ({resamples} resamples)." if resamples else ""
    return (
        f"On the split `{as_cell(metrics['split'])}` of {as_cell(dataset)}: {metrics['num_studies']} studies of "
        f"{metrics['num_patients']} patients{questions}, by `train/evaluate.py`. {intervals} Floors do "
        "without what this model reads in the scan: chance, random, constant and majority texts, age and sex alone, "
        "the nearest training report. Numbers of different protocols are not comparable."
    )


def _table(rows: list[dict], role: str) -> str:
    """A row for each headline score: the model, its text about other scans, the best floor, the protocol."""
    systems = [role, *(system for system in (OTHER, BLANK) if any(row["system"] == system for row in rows))]
    by_place = {(row["system"], row["score"]): row for row in rows}
    own = [row["score"] for row in rows if row["system"] == role]
    scores = [name for name in HEADLINES if name in own]
    scores += [name for name in own if name.startswith(GROUPS)]
    table = []
    for score in scores:
        cells = [_number(by_place.get((system, score))) for system in systems]
        floor = _best_floor(rows, score, systems)
        best = f"{floor['value']:.3f}: {floor['system']}" if floor is not None else ""
        table.append((score, *cells, best, by_place[role, score]["protocol"]))
    named = ["this model", *(system.removeprefix("model, ") for system in systems[1:])]
    return plain_table(("score", *named, "best floor", "protocol"), table)


def _number(row: dict | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
    return f"{row['value']:.3f}{interval}"


def _floors(rows: list[dict], score: str, systems: list[str]) -> list[dict]:
    left_out = (*systems, *NO_FLOOR, OTHER, BLANK)
    return [
        row for row in rows if row["score"] == score and row["system"] not in left_out and row["value"] is not None
    ]


def _best_floor(rows: list[dict], score: str, systems: list[str]) -> dict | None:
    floors = [] if score in DIVERSITY else _floors(rows, score, systems)
    return max(floors, key=lambda row: row["value"], default=None)


def _weaknesses(tasks: dict[str, list[dict]], role: str, settings: dict[str, Any]) -> list[str]:
    found = []
    for task, rows in tasks.items():
        values = {row["score"]: row for row in rows if row["system"] == role}
        known = {score: row for score, row in values.items() if row["value"] is not None}
        below = [score for score, row in known.items() if _is_below(row, _floors(rows, score, [role]))]
        if findings := [score[3:-1] for score in below if score.startswith("f1[")]:
            found.append(f"Findings whose F1 is no better than the best floor's: {', '.join(map(as_cell, findings))}.")
        if headlines := [score for score in below if score in HEADLINES and score not in DIVERSITY]:
            found.append(f"{task}: no better than the best floor by {', '.join(map(as_cell, headlines))}.")
        if absent := [score[3:-1] for score, row in values.items() if score.startswith("f1[") and not row["value"]]:
            missing = [name for name in absent if values[f"f1[{name}]"]["value"] is None]
            never = [name for name in absent if name not in missing]
            found += [f"Never found where it is: {', '.join(map(as_cell, never))}."] if never else []
            found += [f"Not in the test split, so unknown: {', '.join(map(as_cell, missing))}."] if missing else []
        other = {row["score"]: row["value"] for row in rows if row["system"] == OTHER}
        blind = [score for score, row in known.items() if "[" in score and row["value"] <= (other.get(score) or -1)]
        if blind := [score for score in blind if not score.startswith("set_")]:
            found.append(f"{task}: as good with another patient's scan by {', '.join(map(as_cell, blind))}.")
    if role == OWN and settings.get("temperature"):
        found.append(
            f"The reports that were scored were sampled at temperature {settings['temperature']:g}: another draw says "
            "something else."
        )
    return found


def _is_below(row: dict, floors: list[dict]) -> bool:
    return bool(floors) and row["value"] <= max(floor["value"] for floor in floors)
