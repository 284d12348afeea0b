# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a search in an index gives."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Hit:
    """One row that a search found; the ids are pseudonyms unless the index keeps the dataset's own.

    Args:
        rank (`int`): from 1.
        score (`float`): cosine with the query, -1 to 1.
        row (`int`): number in the split of the dataset, or in the table, from 0.
        relation (`str`): to the query: "identical volume", "same study", "same patient" or "".
        copy_of (`int`, *optional*): rank of a better hit with the same voxels (of reports: the same text).
    """

    rank: int
    score: float
    volume_id: str
    study_id: str
    patient_id: str
    split: str
    row: int
    age: int | None
    sex: str | None
    labels: list[str] | None
    report: str
    relation: str
    copy_of: int | None


@dataclass
class SearchResult:
    """
    Args:
        hits: the best first.
        num_candidates (`int`): rows that were ranked.
        left_out (`dict[str, int]`): rows that pass the filters but are the query's own, by relation.
        is_guarded (`bool`):
            Whether the query's patient is known, by a volume of theirs in the index or by `patient_id`. If not, other
            scans of the patient may be among the hits.
    """

    hits: list[Hit]
    num_candidates: int
    left_out: dict[str, int]
    is_guarded: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
