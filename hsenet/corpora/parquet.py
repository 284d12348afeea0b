"""Rows to Parquet files and back, one batch in memory at a time."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Features

from .files import partial_name


def write_rows(path: Path, rows: Iterable[dict[str, Any]], features: Features, rows_per_group: int = 1000) -> None:
    """
    Write rows under another name and rename the whole file; columns that a row lacks are null.

    Args:
        rows_per_group (`int`): rows in a row group, the smallest part of the file that a reader fetches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, rows = partial_name(path), iter(rows)
    schema = features.arrow_schema
    with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        while batch := list(islice(rows, rows_per_group)):
            columns = {name: [row.get(name) for row in batch] for name in schema.names}
            writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))
    os.replace(unfinished, path)


def read_rows(path: Path, without: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, without the column `without`, whose values are not read."""
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name != without]
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=columns).to_pylist()
