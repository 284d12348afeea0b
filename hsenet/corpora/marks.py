"""What is known from the tables alone: splits by patient, sibling reconstructions, duplicate reports."""

import hashlib
from collections.abc import Sequence
from typing import Any


SPLITS = ("test", "validation", "train")  # the most held-out first


def split_of(patient_id: str, fractions: dict[str, float], seed: int) -> str:
    """
    The patient's split: `fractions` of all patients by name, the rest "train".

    It follows from the patient alone, so more patients, or another corpus of the same patients, move nobody.
    """
    digest = hashlib.sha256(f"{seed} {patient_id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    for split, fraction in fractions.items():
        if draw < fraction:
            return split
        draw -= fraction
    return "train"


def first_patients(rows: Sequence[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """Rows of the first `count` patients of each split, all if None."""
    kept: dict[str, dict[str, None]] = {}
    for row in rows:
        patients = kept.setdefault(row["split"], {})
        if count is None or len(patients) < count:
            patients[row["patient_id"]] = None
    return [row for row in rows if row["patient_id"] in kept[row["split"]]]


def mark(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of splits, studies and reconstructions, with `sibling_of` and `duplicate_of`."""
    order = {split: number for number, split in enumerate(SPLITS)}
    ordered = sorted(rows, key=lambda row: (order[row["split"]], row["study_id"], row["reconstruction"]))
    first_volume: dict[str, str] = {}
    first_study: dict[str, str] = {}
    marked = []
    for row in ordered:
        volume = first_volume.setdefault(row["study_id"], row["volume_name"])
        study = first_study.setdefault(report_key(row), row["study_id"])
        marks = {
            "sibling_of": volume if volume != row["volume_name"] else None,
            "duplicate_of": study if study != row["study_id"] else None,
        }
        marked.append({**row, **marks})
    return marked


def report_key(row: dict[str, Any]) -> str:
    """The same for reports that differ in case and blanks only."""
    text = " ".join(f"{row['findings'] or ''} {row['impression'] or ''}".lower().split())
    return hashlib.sha256(text.encode()).hexdigest()
