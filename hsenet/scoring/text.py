"""Reports and answers: what a model writes about the own, another patient's and no scan, scored beside the floors."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsenet.metrics.bootstrap import compare_runs
from hsenet.metrics.diversity import diversity
from hsenet.metrics.report import best_constant_report_floor, report_metrics
from hsenet.metrics.table import Result, as_cell
from hsenet.metrics.tally import Tally
from hsenet.metrics.verdict import image_verdict
from hsenet.metrics.vqa import majority_answer_floor, vqa_metrics
from hsenet.scoring.floors import FINE, age_and_sex_labels, constant_for_bleu, random_reports
from hsenet.scoring.output import Scorer, plain_results
from hsenet.scoring.tallies import ReportTask


OWN, OTHER, BLANK = "model", "model, another patient's scan", "model, blank scan"
DETAILS = {OWN: "model", OTHER: "shuffled_volumes", BLANK: "blank_volumes"}
DECIDING = {"report": "findings_f1_macro", "vqa": "accuracy"}  # what the verdict looks at
Tallies = dict[str, list[Tally]]  # of each system
Texts = dict[str, list[str]]  # of each system


def report_floors(
    task: ReportTask, rows: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]], seed: int
) -> tuple[Texts, Tallies, dict[str, Any]]:
    """Floors that write a report, floors that only name findings, and `best_constant_report_floor`."""
    reports, number = [row["text"] for row in training], len(rows)
    texts = {"random training report": random_reports(reports, number, seed)}
    texts["constant report, best for BLEU"] = [constant_for_bleu(reports, task.references, seed)] * number
    best: dict[str, Any] = {}
    if task.has_findings:
        best = best_constant_report_floor(task.truth, training_reports=reports, labeller=task.labeller)
        texts["constant report, best for F1"] = [best["constant_report"]] * number
    found = {"all findings claimed": np.ones_like(task.truth)}
    given = all(row.get("labels") for row in training)
    labels = np.array([row["labels"] for row in training]) if given else task.labeller(reports)
    guessed = age_and_sex_labels(training, labels, rows)
    if guessed is not None:
        found["age and sex alone"] = guessed
    return texts, {system: task.finding_tallies(matrix) for system, matrix in found.items()}, best


def majority_floors(questions: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`majority_answer_floor` by type and by type and finding."""
    floors = {}
    for name, columns in (("type", ("question_type",)), ("type_and_finding", FINE)):
        train_groups, groups = ([tuple(row[c] for c in columns) for row in rows] for rows in (training, questions))
        train_answers, answers = ([row["answer"] for row in rows] for rows in (training, questions))
        floors[name] = majority_answer_floor(train_answers, train_groups, answers, groups)
    return floors


def score_systems(tallies: Tallies, score: Scorer) -> list[Result]:
    return [result for system, of_system in tallies.items() for result in score(system, of_system)]


def diversity_results(texts: Texts) -> list[Result]:
    several = {system: of_system for system, of_system in texts.items() if len(of_system) > 1}
    return [
        result
        for system, of_system in several.items()
        for result in plain_results(system, diversity(of_system), "diversity/1")
    ]


def details_of(
    task: ReportTask, questions: Sequence[dict[str, Any]], written: dict[str, Texts]
) -> dict[str, dict[str, Any]]:
    """`report_metrics` and `vqa_metrics` of the model with its own, another and no scan."""
    details: dict[str, dict[str, Any]] = {}
    for system, texts in written["report"].items():
        scores: dict[str, Any] = {"num_reports": len(texts)}
        if task.has_findings:
            scores = report_metrics(texts, task.references, reference_labels=task.truth, labeller=task.labeller)
        details[DETAILS[system]] = {"report": scores, "vqa": None}
    for system, answers in written.get("vqa", {}).items():
        columns = ([row[name] for row in questions] for name in ("answer", "question_type"))
        details[DETAILS[system]]["vqa"] = vqa_metrics(answers, *columns)
    return details


def verdict_of(
    tallies: dict[str, Tallies],
    written: dict[str, Texts],
    patients: dict[str, Sequence[str]],
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """`image_verdict` over the tasks; the dictionaries are by task, with systems, texts, and patients of the items."""
    own, other = {}, {}
    for task, systems in tallies.items():
        for one, two in zip(systems[OWN], systems[OTHER], strict=True):
            if DECIDING[task] in one.scores() and len(set(patients[task])) > 1:
                own[task], other[task] = (one, DECIDING[task]), (two, DECIDING[task])
    if not own:
        return not_tested("it takes findings in the references, or questions, of several patients.")
    pairs = {task: (written[task][OWN], written[task][OTHER]) for task in own}
    return image_verdict(own, other, patients, texts=pairs, num_resamples=num_resamples, seed=seed)


def not_tested(reason: str) -> dict[str, Any]:
    return {"depends": None, "text": f"**Not tested whether the text depends on the image:** {reason}"}


def compare_with(
    own: dict[str, list[Tally]],
    baseline: dict[str, list[Tally]],
    patients: dict[str, Sequence[str]],
    num_resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Paired differences of every score, this run minus the other: records with `task`, `protocol`, `score`."""
    records = []
    for task, tallies in own.items():
        for one, two in zip(tallies, baseline[task], strict=True):
            compared = compare_runs(one, two, patients[task], num_resamples=num_resamples, seed=seed)
            records += [{"task": task, "protocol": one.protocol, "score": n, **v} for n, v in compared.items()]
    return records


def comparison_table(records: Sequence[dict[str, Any]], baseline: str) -> str:
    """Markdown of `compare_with`, without the single findings."""
    lines = [
        f"### This run minus {as_cell(baseline)}, paired by patient",
        "",
        "| task | protocol | score | difference | p (Holm) |",
    ]
    lines.append("|---|---|---|---|---|")
    for record in records:
        if "[" not in record["score"]:
            difference = f"{record['difference']:+.3f} [{record['low']:+.3f}, {record['high']:+.3f}]"
            names = " | ".join((record["task"], f"`{as_cell(record['protocol'])}`", record["score"]))
            lines.append(f"| {names} | {difference} | {record['p_holm']:.4f} |")
    return "\n".join(lines)


def write_predictions(path: Path, rows: dict[str, list[dict[str, Any]]], written: dict[str, Texts]) -> None:
    """One line a row: what was asked, the truth, and what was written about the own, another and no scan."""
    names = ("volume_name", "study_id", "patient_id", "question_type", "question", "answer")
    columns = {OWN: "prediction", OTHER: "prediction_shuffled", BLANK: "prediction_blank"}
    with path.open("w") as file:
        for task, of_task in rows.items():
            for index, row in enumerate(of_task):
                texts = {columns[system]: texts[index] for system, texts in written[task].items()}
                file.write(json.dumps({**{name: row.get(name) for name in names}, **texts}) + "\n")


def read_predictions(folder: str | Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """
    What another run wrote about the same rows, from its `predictions.jsonl`.

    Raises:
        ValueError: it lacks some of the rows: a paired test needs them all.
    """
    written = dict(_predictions(Path(folder) / "predictions.jsonl"))
    keys = [_key(row) for row in rows]
    if missing := sum(key not in written for key in keys):
        raise ValueError(f"The baseline in {folder} has no prediction for {missing} of {len(keys)} rows.")
    return [written[key] for key in keys]


def _predictions(path: Path) -> Iterator[tuple[tuple, str]]:
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            yield _key(row), row["prediction"]


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["volume_name"], row["question_type"], row["question"]
