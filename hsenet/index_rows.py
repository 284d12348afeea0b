# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a search index knows of each volume: rows of a dataset in our format, or of a table of scans."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import get_dataset_split_names

from hsenet.corpora import Corpus
from hsenet.corpora.tables import age_in_years, number_or_none, read_table, sex_or_none, text_or_none
from hsenet.data import dataset_root, load_rows
from hsenet.phantom import CT_RATE_LABELS


TABLE_SUFFIXES = (".csv", ".parquet")
TABLE_COLUMNS = ("volume", "patient_id")  # without patients a search could not leave out the query's own
TABLE_TEXTS = ("volume_name", "study_id", "split", "findings", "impression", "content_hash")
TABLE_SPLIT = "scans"  # of a table that has none


def load_source(source: str, splits: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """
    Rows by split, each with what `read_scan` takes, `row` (its number), `volume_name`, `study_id`, `patient_id`,
    `findings`, `impression`, `age`, `sex`, `content_hash` and `labels` (names of findings; None: not known).

    Args:
        source:
            A dataset folder or Hub id with `reports` rows; or a CSV or Parquet file, whose columns are named as in our
            datasets: `volume` (relative to the table's folder) and `patient_id`, and, where known, `volume_name`,
            `study_id`, `split`, `findings`, `impression`, `age`, `sex`, `labels` (names, separated by ";"),
            `hu_slope`, `hu_intercept`.
        splits: only these; None: all.

    Raises:
        ValueError: a column or a split is missing, there is no row, or a volume's name repeats.
    """
    rows = _table_rows(Path(source)) if source.endswith(TABLE_SUFFIXES) else _dataset_rows(source, splits)
    by_split: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_split.setdefault(row["split"], []).append(row)
    if splits is not None:
        _check_splits(splits, by_split)
        by_split = {split: by_split[split] for split in splits}
    names = [row["volume_name"] for rows in by_split.values() for row in rows]
    if not names:
        raise ValueError("There is no row to index.")
    if len(set(names)) < len(names):
        raise ValueError(f"{len(names) - len(set(names))} rows repeat a volume_name: expected one row a volume.")
    return by_split


def source_id(source: str) -> str | None:
    """The Hub dataset with its revision; nothing of what lies on this machine, whose paths are nobody's business."""
    if Path(source).exists():
        return None
    return f"{source}@{dataset_root(source)[1]}"


def _dataset_rows(source: str, splits: Sequence[str] | None) -> list[dict[str, Any]]:
    known = _known_splits(source)
    if splits is not None:
        _check_splits(splits, known)
    rows = []
    for split in known if splits is None else splits:
        for row in load_rows(source, "reports", split):
            if "patient_id" not in row:
                raise ValueError("The dataset has no column patient_id: a search could not leave out the query's own.")
            labels = row.get("labels")
            names = None if labels is None else [CT_RATE_LABELS[i] for i, present in enumerate(labels) if present]
            optional = {name: row.get(name) for name in ("age", "sex", "content_hash", "findings", "impression")}
            rows.append({**row, **optional, "split": split, "labels": names})
    return rows


def _known_splits(source: str) -> list[str]:
    try:
        return get_dataset_split_names(source, "reports", revision=dataset_root(source)[1])
    except Exception as error:  # of datasets, or of whichever HTTP library the Hub's client is built on
        raise ValueError(
            f"Found no dataset with `reports` rows in the given folder or Hub repository ({error}): expected one as "
            "our build scripts write it, or a .csv or .parquet table of scans."
        ) from error


def _table_rows(table: Path) -> list[dict[str, Any]]:
    if not table.is_file():
        raise FileNotFoundError("There is no table at the given place: expected a .csv or .parquet file.")
    rows = []
    for number, entry in enumerate(read_table(Corpus(str(table.resolve().parent)), table.name, TABLE_COLUMNS)):
        value = {name: text_or_none(entry.get(name)) for name in (*TABLE_COLUMNS, *TABLE_TEXTS)}
        if None in (value["volume"], value["patient_id"]):
            raise ValueError(f"Row {number + 1} of the table lacks volume or patient_id: expected both.")
        rows.append(
            {
                **value,
                "row": number,
                "volume": str(table.parent / value["volume"]),
                "volume_name": value["volume_name"] or value["volume"],
                "study_id": value["study_id"] or value["volume"],
                "split": value["split"] or TABLE_SPLIT,
                "from_split": value["split"] or TABLE_SPLIT,
                "labels": _label_names(entry.get("labels")),
                "age": age_in_years(entry.get("age")),
                "sex": sex_or_none(entry.get("sex")),
                "hu_slope": number_or_none(entry.get("hu_slope")),
                "hu_intercept": number_or_none(entry.get("hu_intercept")),
            }
        )
    return rows


def _label_names(value: Any) -> list[str] | None:
    if isinstance(value, list):  # of a Parquet table
        return value
    text = text_or_none(value)
    return None if text is None else [name.strip() for name in text.split(";")]


def _check_splits(asked: Sequence[str], known: Iterable[str]) -> None:
    if missing := sorted(set(asked) - set(known)):
        raise ValueError(f"There is no split {', '.join(missing)}: expected some of {', '.join(sorted(known))}.")
