# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Which rows of an index a search may return: filters by metadata, and the guard against the patient's own scans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset


# How a row may be related to the query, the closest first; "" is not at all.
RELATIONS = ("identical volume", "same study", "same patient")


@dataclass
class Columns:
    """The metadata of all rows of an index, one entry each; what is not known is None, of ages NaN."""

    volume_id: list[str]
    study_id: np.ndarray
    patient_id: np.ndarray
    split: np.ndarray
    sex: list[str | None]
    age: np.ndarray
    labels: list[list[str] | None]
    content_hashes: list[list[str]]
    has_report: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> "Columns":
        return cls(
            volume_id=dataset["volume_id"][:],
            study_id=np.array(dataset["study_id"][:]),
            patient_id=np.array(dataset["patient_id"][:]),
            split=np.array(dataset["split"][:]),
            sex=dataset["sex"][:],
            age=np.array([np.nan if age is None else age for age in dataset["age"][:]]),
            labels=dataset["labels"][:],
            content_hashes=dataset["content_hashes"][:],
            has_report=np.array([report != "" for report in dataset["report"][:]]),
        )


@dataclass(frozen=True)
class Filter:
    """
    What a row has to be, all of it; by default anything. A row whose value is not known passes no filter on it.

    Args:
        sex (`"M"` or `"F"`, *optional*).
        min_age, max_age (`int`, *optional*): years, both included.
        labels: findings that all have to be there, by name.
        without_labels: findings of which none may be there.
        splits: one of these; empty: any.
    """

    sex: str | None = None
    min_age: int | None = None
    max_age: int | None = None
    labels: Sequence[str] = ()
    without_labels: Sequence[str] = ()
    splits: Sequence[str] = ()

    def mask(self, columns: Columns) -> np.ndarray:
        """
        `(num_rows,)`, true where a row passes.

        Raises:
            ValueError: no row of the index has such a value, so that nothing could ever pass.
        """
        passes = np.ones(len(columns.split), dtype=bool)
        if self.splits:
            _check("split", self.splits, columns.split)
            passes &= np.isin(columns.split, list(self.splits))
        if self.sex is not None:
            _check("sex", [self.sex], columns.sex)
            passes &= np.array([sex == self.sex for sex in columns.sex])
        if self.min_age is not None or self.max_age is not None:
            if np.isnan(columns.age).all():
                raise ValueError("No row of this index has an age: it cannot be searched by age.")
            passes &= columns.age >= (-np.inf if self.min_age is None else self.min_age)
            passes &= columns.age <= (np.inf if self.max_age is None else self.max_age)
        if self.labels or self.without_labels:
            known = [label for labels in columns.labels if labels for label in labels]
            _check("label", [*self.labels, *self.without_labels], known)
            wanted, unwanted = set(self.labels), set(self.without_labels)
            passes &= np.array(
                [
                    labels is not None and wanted <= set(labels) and not unwanted & set(labels)
                    for labels in columns.labels
                ]
            )
        return passes


def _check(what: str, asked: Sequence[str], values: Sequence[Any]) -> None:
    known = sorted({str(value) for value in values if value is not None})
    if missing := [value for value in asked if value not in known]:
        raise ValueError(
            f"No row of this index has the {what} {', '.join(missing)}: expected one of {', '.join(known) or 'none'}."
        )


def relations(
    columns: Columns, hashes: Sequence[str], study_id: str | None = None, patient_id: str | None = None
) -> np.ndarray:
    """
    How each row is related to a query: one of [`RELATIONS`], the closest, or "", `(num_rows,)`.

    A volume in the index with the query's voxels tells who the patient is, so that the siblings of that volume and
    the patient's other studies are found without being told.

    Args:
        hashes: the content hashes of the query's volume; empty for a text alone.
        study_id, patient_id (`str`, *optional*): the query's, as they are in the index.
    """
    identical = np.array([not set(hashes).isdisjoint(row) for row in columns.content_hashes])
    of_study = np.isin(columns.study_id, [*columns.study_id[identical], *([study_id] if study_id else [])])
    of_patient = np.isin(columns.patient_id, [*columns.patient_id[of_study], *([patient_id] if patient_id else [])])
    return np.select([identical, of_study, of_patient], RELATIONS, default="")
