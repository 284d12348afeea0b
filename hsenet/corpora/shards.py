"""The scans of a build, read by several processes into files that are whole or absent, so that a rerun goes on."""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hsenet.digests import content_hash
from hsenet.scans import read_hu
from reading_hsenet import HSENetInputError, Volume

from .files import write_atomically
from .marks import SPLITS
from .parquet import write_rows
from .schema import REPORT_FEATURES, VOLUME_FEATURES
from .source import Corpus, CorpusError, MissingInCorpusError
from .volumes import coarser, has_blank_header, to_nifti


BLANK_HEADER = "blank header"
LINK = "corpus"  # in a dataset that points into a local copy, the link to it


def read_file(corpus: Corpus, row: dict[str, Any], reading: dict[str, Any] | None = None) -> Volume:
    """The row's scan from a file, or a local DICOM folder, in HU; `reading`: further options of the reader."""
    with corpus.fetch(row["file"]) as path:
        try:
            return read_hu(path, row["hu_slope"], row["hu_intercept"], **(reading or {}))
        except HSENetInputError as error:
            if path.is_file() and has_blank_header(path):
                raise HSENetInputError(BLANK_HEADER) from error
            raise


def exclusion(row: dict, reason: str) -> dict[str, str]:
    return {"volume_name": row["volume_name"], "split": row["split"], "reason": reason}


@dataclass(frozen=True)
class Shard:
    name: str  # without suffix: "train-00000-of-00009"
    rows: tuple[dict, ...]


def split_into_shards(rows: list[dict], size: int) -> list[Shard]:
    shards = []
    for split in SPLITS:
        group = [row for row in rows if row["split"] == split]
        count = -(-len(group) // size)
        for number in range(count):
            part = tuple(group[number * size : (number + 1) * size])
            shards.append(Shard(f"{split}-{number:05d}-of-{count:05d}", part))
    return shards


def shard_path(output: Path, shard: str, volumes: str) -> Path:
    return output / ("volumes" if volumes == "nifti" else "build") / f"{shard}.parquet"


def write_shards(
    rows: list[dict], read: Callable[[Corpus, dict], Volume], corpus: Corpus, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Write the shards that are not there yet; return what could not be used in any of them, with the reasons."""
    output = arguments.output
    shards = split_into_shards(rows, arguments.shard_rows)
    todo = [shard for shard in shards if not shard_path(output, shard.name, arguments.volumes).exists()]
    spacing = tuple(arguments.spacing) if arguments.spacing else None
    write = partial(_write_shard, output=output, read=read, corpus=corpus, volumes=arguments.volumes, spacing=spacing)
    for _ in tqdm(_parallel(write, todo, arguments.workers), "shards", len(todo), disable=not todo):
        pass
    notes = (json.loads((output / f"build/{shard.name}.json").read_text()) for shard in shards)
    return [found for note in notes for found in note]


def _parallel(work: Callable, items: list, workers: int) -> Iterator:
    if workers == 1 or len(items) < 2:
        yield from map(work, items)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several BLAS threads in each worker would fight for the cores
    # Fresh interpreters (spawn): the parent has loaded threaded libraries that a fork would copy half-way.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(work, items)


def _write_shard(
    shard: Shard,
    *,
    output: Path,
    read: Callable[[Corpus, dict], Volume],
    corpus: Corpus,
    volumes: str,
    spacing: tuple[float, float, float] | None,
) -> None:
    """The shard's rows with their hashes and, if asked for, scans; rows that cannot be read are noted instead."""
    excluded: list[dict[str, str]] = []

    def rows() -> Iterator[dict]:
        for row in shard.rows:
            try:
                volume = read(corpus, row)
            except HSENetInputError as error:
                excluded.append(exclusion(row, str(error)))
                continue
            except CorpusError as error:  # whose words name the file
                missing = isinstance(error, MissingInCorpusError)
                excluded.append(exclusion(row, "not in the corpus" if missing else "in a damaged archive"))
                continue
            yield {**row, "content_hash": content_hash(volume), **_stored(row, volume, volumes, spacing)}
        # Before the shard has its name: a shard that is there always has its note.
        write_atomically(output / f"build/{shard.name}.json", json.dumps(excluded, indent=1).encode())

    features = VOLUME_FEATURES if volumes == "nifti" else REPORT_FEATURES
    write_rows(shard_path(output, shard.name, volumes), rows(), features, 1 if volumes == "nifti" else 1000)


def _stored(row: dict, volume: Volume, volumes: str, spacing: tuple[float, float, float] | None) -> dict:
    """The columns that say where the scan is and how its values become HU."""
    if volumes == "reference":
        return {"volume": f"{LINK}/{row['file']}"}
    content = to_nifti(coarser(volume, spacing) if spacing else volume)
    scan = {"bytes": content, "path": f"{row['volume_name']}.nii.gz"}
    return {"volume": scan, "hu_slope": None, "hu_intercept": None}


def stop_if_unreadable(found: list[dict[str, str]], arguments: argparse.Namespace) -> None:
    """Too many failures end the build; their shards are removed, so that a rerun reads those scans again."""
    failed = [failure for failure in found if failure["reason"] != BLANK_HEADER]
    if len(failed) <= arguments.allow_unreadable:
        return
    for note in (arguments.output / "build").glob("*.json"):
        if any(failure in failed for failure in json.loads(note.read_text())):
            shard_path(arguments.output, note.stem, arguments.volumes).unlink()
    lines = "\n".join(f"  {failure['volume_name']}: {failure['reason']}" for failure in failed[:20])
    raise SystemExit(
        f"{len(failed)} scans could not be read, {arguments.allow_unreadable} may (--allow-unreadable):\n{lines}\n"
        "All are in excluded.csv (and, with --deidentify, their files in OUTPUT.names.csv). Correct the files and run "
        "again: only their shards are built anew."
    )
