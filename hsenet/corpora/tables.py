"""Tables of a corpus: rows by column name, with blanks as None, and the values that most corpora write oddly."""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet

from .source import Corpus, CorpusError


BLANK = {"", "nan", "none", "not given", "not given."}  # what corpora write where nothing is known


def read_table(corpus: Corpus, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """
    Rows of a CSV or Parquet file, with the values of all its columns.

    Raises:
        CorpusError: the file is of another kind, one of `columns` is missing, or a row does not fit the header.
    """
    content = corpus.read(name)
    if name.endswith(".parquet"):
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        found, rows = table.column_names, table.to_pylist()
    elif name.endswith(".csv"):
        rows, found = _read_csv(content, name)
    else:
        raise CorpusError(f"{name} is no table that is read: expected a name that ends in .csv or .parquet.")
    if missing := [column for column in columns if column not in found]:
        raise CorpusError(
            f"{name} has no column {', '.join(missing)}: expected it among its columns {', '.join(found)}. "
            "Is this the corpus, in the release that the script reads?"
        )
    return rows


def _read_csv(content: bytes, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CorpusError(f"{name} is not in UTF-8: save it so, or letters of the reports would be wrong.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows, found = list(reader), list(reader.fieldnames or [])
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise CorpusError(
                f"Row {number} of {name} has another number of values than its header: expected {len(found)}. "
                "Get the file again."
            )
    return rows, found


def text_or_none(value: Any) -> str | None:
    """The text without surrounding blanks, or None for what stands for "nothing"."""
    text = "" if value is None else str(value).strip()
    return None if text.lower() in BLANK else text


def age_in_years(value: Any) -> int | None:
    """DICOM ages ("048Y", "011M") and plain numbers to whole years."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD]?)\w*", (text_or_none(value) or "").upper())
    if match is None:
        return None
    number, unit = float(match[1]), match[2] or "Y"
    return int(number / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[unit])


def sex_or_none(value: Any) -> str | None:
    """M or F; anything else is unknown."""
    first = (text_or_none(value) or "?").upper()[0]
    return first if first in "MF" else None


def number_or_none(value: Any) -> float | None:
    """
    Raises:
        CorpusError: there is something, but no number.
    """
    text = text_or_none(value)
    try:
        return None if text is None else float(text)
    except ValueError:
        # Without the value: the wrong column could hold names.
        raise CorpusError("A table has text where a number is expected: is it the right table and column?") from None
