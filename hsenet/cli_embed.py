# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet embed`: options to [`~hsenet.embedding.Embedder`], its embeddings to a file and their cosines to a table."""

import argparse
import json as json_format
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from hsenet.cli_scan import (
    SCAN_HELP,
    add_model_options,
    add_read_options,
    base_name,
    chosen_device,
    numbered,
    read_options,
    refuse,
    say,
    with_options,
    without_uid,
)
from hsenet.digests import content_hash
from hsenet.embedding import Embedder
from hsenet.encoded_scan import describe_geometry, read_with_warnings
from hsenet.report_record import RESEARCH_ONLY, library_versions, model_identity
from hsenet_command import UsageError
from reading_hsenet import HSENetInputError


def add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="contrastive model (stage 1 or 2): folder or Hub id")
    parser.add_argument("scans", metavar="SCAN", nargs="+", help=SCAN_HELP)
    parser.add_argument("--text", metavar="TEXT", action="append", default=[], help="to compare with; may be repeated")
    parser.add_argument(
        "--output", metavar="FILE.safetensors", help="`volumes`, `texts` and the `numbers` of the scans that were read"
    )
    parser.add_argument("--json", action="store_true", help="all as one JSON object, and no progress")
    parser.add_argument("--keep_names", action="store_true", help="put the scans' file names into JSON and file")
    add_model_options(parser.add_argument_group("model"))
    add_read_options(parser)
    parser.set_defaults(run=_run_embed)


def _run_embed(
    model: str,
    scans: list[str],
    *,
    text: list[str],
    output: str | None,
    json: bool,
    keep_names: bool,
    revision: str | None,
    device: str | None,
    **options,
) -> int:
    _check_output(output)
    if output is None and not json and not text and len(scans) < 2:
        raise UsageError("nothing to show: give --text to compare with, more scans, --output or --json")
    where, reading = chosen_device(device), read_options(options)
    embedder = Embedder.load(model, revision)
    embedder.model.to(where)
    identity = model_identity(model, embedder.model, revision)
    records, embeddings = [], []
    for number, scan in numbered(scans, json=json):
        try:
            volume, warnings = read_with_warnings(scan, **reading)
        except (HSENetInputError, ImportError) as error:
            refuse(number, len(scans), error, json=False)
            message = with_options(str(error))
            records.append({"number": number, "error": {"type": type(error).__name__, "message": message}})
            continue
        for warning in warnings:
            say(f"scan {number}: warning: {warning}", json=json)
        embeddings.append(embedder.volume(volume))
        about = {"sha256": content_hash(volume), **describe_geometry(volume)}
        name = {"name": base_name(scan)} if keep_names else {}
        records.append({"number": number, **name, **about, "warnings": warnings})
    volumes = np.stack(embeddings) if embeddings else np.empty((0, embedder.model.config.projection_dim), np.float32)
    texts = embedder.texts(text) if text else np.empty((0, volumes.shape[1]), np.float32)
    read = [record["number"] for record in records if "error" not in record]
    result = {
        "model": identity,
        "scans": records,
        "texts": text,
        # Of the scans that were read, in the order of `read`: with each other, and with the texts.
        "read": read,
        "volume_similarity": (volumes @ volumes.T).tolist(),
        "text_similarity": (volumes @ texts.T).tolist(),
        "settings": {"device": where.type, "reading": without_uid(reading)},
        "versions": library_versions(),
    }
    if output is not None:
        _write(Path(output), {"volumes": volumes, "texts": texts, "numbers": np.array(read, dtype=np.int64)}, result)
    print(json_format.dumps(result, indent=2) if json else _table(result))
    say(f"{RESEARCH_ONLY}.", json=json)
    return 1 if len(read) < len(scans) else 0


def _check_output(output: str | None) -> None:
    if output is not None and not output.endswith(".safetensors"):
        raise UsageError("--output is a safetensors file: its name should end with .safetensors")
    if output is not None and Path(output).exists():
        raise ValueError("The output file is already there: choose another one.")


def _write(path: Path, tensors: dict[str, np.ndarray], result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kept = {name: result[name] for name in ("model", "scans", "texts", "settings", "versions")}
    unfinished.write_bytes(save(tensors, {"embeddings": json_format.dumps(kept)}))
    unfinished.replace(path)


def _table(result: dict[str, Any]) -> str:
    """Cosines: a row for each scan that was read."""
    lines = []
    texts, read = result["texts"], result["read"]
    lines += [f"text {number}: {text}" for number, text in enumerate(texts, start=1)]
    heads = [f"text {number}" for number in range(1, len(texts) + 1)]
    rows = result["text_similarity"]
    if len(read) > 1:
        heads += [f"scan {number}" for number in read]
        rows = [[*row, *more] for row, more in zip(rows, result["volume_similarity"], strict=True)]
    if heads and read:
        lines.append(f"{'cosine':>10}" + "".join(f"{head:>10}" for head in heads))
        for number, row in zip(read, rows, strict=True):
            lines.append(f"{f'scan {number}':>10}" + "".join(f"{value:>+10.3f}" for value in row))
    return "\n".join(lines)
