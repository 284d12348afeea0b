# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""A search index on disk: a `datasets` Dataset of embeddings and rows, and `index.json`, which says what made it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from hsenet.conversion_output import finished_folder
from hsenet.corpora.pseudonyms import pseudonyms
from hsenet.data import report_text
from hsenet.embedding import Embedder
from hsenet.index_filters import Columns
from hsenet.index_rows import load_source, source_id
from hsenet.volume_cache import VolumeCache, cache_volumes


FILE = "index.json"
FORMAT = 1  # raise it when an index of before can no longer be read
TARGETS = {"volumes": "image_embedding", "reports": "text_embedding"}
ROW = {
    "volume_id": Value("string"),
    "study_id": Value("string"),
    "patient_id": Value("string"),
    "split": Value("string"),
    "row": Value("int32"),
    "age": Value("int16"),
    "sex": Value("string"),
    "labels": ListOf(Value("string")),
    "report": Value("string"),
}


def write_index(
    output: Path,
    source: str,
    embedder: Embedder,
    splits: Sequence[str] | None,
    report_fields: Sequence[str],
    *,
    cache_dir: str | Path,
    batch_size: int,
    num_workers: int,
    keep_ids: bool,
) -> None:
    """See [`~hsenet.index.SearchIndex.build`]."""
    rows_of = load_source(source, splits)
    run = Accelerator(cpu=not torch.accelerator.is_available())
    embedder.model.to(run.device)
    with finished_folder(output) as folder:
        name = str if keep_ids else pseudonyms(output)
        parts = []
        for rows in rows_of.values():
            processor, slice_encoder = embedder.image_processor, embedder.model.slice_encoder
            cache = cache_volumes(rows, processor, slice_encoder, cache_dir, run, num_workers)
            parts.append(_columns(rows, cache, embedder, tuple(report_fields), batch_size, name))
        columns = {key: [value for part in parts for value in part[key]] for key in parts[0]}
        dataset = Dataset.from_dict(columns, features=_features(embedder.model.config.projection_dim))
        dataset.save_to_disk(str(folder))
        info = _info(dataset, embedder, source, list(report_fields), keep_ids=keep_ids)
        (folder / FILE).write_text(json.dumps(info, indent=2) + "\n")


def _columns(
    rows: list[dict], cache: VolumeCache, embedder: Embedder, fields: tuple[str, ...], batch_size: int, name: Callable
) -> dict[str, list]:
    """The index' columns for the rows of a split; a volume without a report has zeros as text embedding."""
    reports = [report_text(row, fields) for row in rows]
    hashes = [sorted({cache.content_hash(row["volume_name"]), *filter(None, [row["content_hash"]])}) for row in rows]
    unique = list(dict.fromkeys(report for report in reports if report))  # siblings share theirs
    texts = dict(zip(unique, embedder.texts(unique), strict=True)) if unique else {}
    nothing = np.zeros(embedder.model.config.projection_dim, dtype=np.float32)
    return {
        "volume_id": [name(row["volume_name"]) for row in rows],
        "study_id": [name(row["study_id"]) for row in rows],
        "patient_id": [name(row["patient_id"]) for row in rows],
        **{column: [row[column] for row in rows] for column in ("split", "row", "age", "sex", "labels")},
        "report": reports,
        "content_hashes": hashes,
        "image_embedding": list(embedder.volumes(rows, cache, batch_size)),
        "text_embedding": [texts.get(report, nothing) for report in reports],
    }


def _features(dim: int) -> Features:
    embedding = ListOf(Value("float32"), length=dim)
    hashes = {"content_hashes": ListOf(Value("string"))}
    return Features({**ROW, **hashes, **dict.fromkeys(TARGETS.values(), embedding)})


def _info(dataset: Dataset, embedder: Embedder, source: str, fields: list[str], *, keep_ids: bool) -> dict[str, Any]:
    """What is in an index and what made it, as JSON."""
    columns = Columns.of(dataset)
    copies = Counter(content for hashes in columns.content_hashes for content in hashes)
    digest = hashlib.sha256()
    for name in ("split", "row", "report", "content_hashes"):
        digest.update(json.dumps(dataset[name][:]).encode())
    return {
        "format": FORMAT,
        "made_with": embedder.identity(),
        "model": embedder.name,
        "dataset": {
            "id": source_id(source),
            "hash": digest.hexdigest(),
            "splits": sorted(set(columns.split.tolist())),
        },
        "report_fields": fields,
        "ids": "kept" if keep_ids else "pseudonyms",
        "volumes": len(dataset),
        "studies": len(set(columns.study_id)),
        "patients": len(set(columns.patient_id)),
        "with_report": int(columns.has_report.sum()),
        "with_identical_volume": sum(any(copies[one] > 1 for one in hashes) for hashes in columns.content_hashes),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, datasets)},
    }


def read_info(folder: Path) -> dict[str, Any]:
    """`index.json`.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"There is no search index in this folder: expected {FILE}. Make one with `hsenet index`.")
    info = json.loads((folder / FILE).read_text())
    if info["format"] != FORMAT:
        raise ValueError(f"The index is of format {info['format']}, expected {FORMAT}: build it again.")
    return info


def check_identity(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the two are not those of the same model, tokenizer and preprocessing; it says what differs.
    """
    changed = [name for name in stored if stored[name] != given[name]]
    if not changed:
        return
    details = {name: (str(stored[name])[:12], str(given[name])[:12]) for name in changed}
    if "image_processor" in changed:
        before, now = stored["image_processor"], given["image_processor"]
        settings = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        details["image_processor"] = tuple({name: each.get(name) for name in settings} for each in (before, now))
    differences = "; ".join(f"{name}: made with {made}, given {now}" for name, (made, now) in details.items())
    raise ValueError(
        f"The index was made with another model or preprocessing ({differences}), so its embeddings mean something "
        "else. Pass the model that made it, or build the index again."
    )
