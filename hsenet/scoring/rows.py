"""The rows of an evaluation: what is scored, and the training rows that the floors take their answers from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsenet.data import load_rows, one_per_study, report_text
from hsenet.report_prompts import REPORT_PROMPTS


@dataclass(frozen=True)
class EvaluationRows:
    """
    Args:
        volumes: of retrieval: those of `ids`, all reconstructions, or the first of each study.
        studies: of reports: the first reconstruction of each study, with `question` and `answer`.
        training: one of each study, with its report as `text`, as the volumes have.
    """

    volumes: list[dict[str, Any]]
    studies: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    training: list[dict[str, Any]]
    training_questions: list[dict[str, Any]]


def load_evaluation_rows(
    dataset: str,
    split: str,
    train_split: str,
    *,
    fields: tuple[str, ...],
    with_questions: bool,
    question_types: list[str],
    all_reconstructions: bool,
    ids: str | None,
    max_rows: int | None,
    prompt: str = REPORT_PROMPTS[0],
) -> EvaluationRows:
    """
    Args:
        ids: file of volume names, one a line: only these, all of them and in this order, whatever
            `all_reconstructions` says. A published list makes a pool comparable.
        max_rows: only the first studies and questions.
        prompt: what asks for a report.

    Raises:
        ValueError: a name of `ids` is not in the split, or repeats.
    """
    rows = [{**row, "text": report_text(row, fields)} for row in load_rows(dataset, "reports", split)]
    if ids is not None:
        rows = _chosen(rows, [name.strip() for name in Path(ids).read_text().splitlines() if name.strip()])
    studies = one_per_study(rows)[:max_rows]
    kept = {row["study_id"] for row in studies}
    several = all_reconstructions or ids is not None
    volumes = [row for row in rows if row["study_id"] in kept] if several else studies
    training = [
        {**row, "text": report_text(row, fields)} for row in one_per_study(load_rows(dataset, "reports", train_split))
    ]
    questions, training_questions = [], []
    if with_questions:
        questions = load_rows(dataset, "vqa", split, None, question_types)
        if ids is not None:
            names = {row["volume_name"] for row in rows}
            questions = [row for row in questions if row["volume_name"] in names]
        training_questions = load_rows(dataset, "vqa", train_split, None, question_types)
    asked = [{**row, "question": prompt, "answer": row["text"], "question_type": "report"} for row in studies]
    return EvaluationRows(volumes, asked, questions[:max_rows], training, training_questions)


def patient_of(row: dict[str, Any]) -> str:
    """The row's patient; in datasets that name none, its study."""
    return row.get("patient_id") or row["study_id"]


def _chosen(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    by_name = {row["volume_name"]: row for row in rows}
    if missing := [number for number, name in enumerate(names, start=1) if name not in by_name]:
        raise ValueError(f"{len(missing)} of {len(names)} ids are not in the split, the first in line {missing[0]}.")
    if repeated := len(names) - len(set(names)):
        raise ValueError(f"{repeated} of {len(names)} ids repeat another: expected each volume once.")
    return [by_name[name] for name in names]
