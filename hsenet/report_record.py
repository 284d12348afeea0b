# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What is kept of a report: its text, and the manifest of all that decided it.

A record names no file, no folder and no header value of the scan, which may identify a patient.
"""

import hashlib
import json
import os
import platform
import shutil
import unicodedata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hsenet.digests import model_digest


RESEARCH_ONLY = "Research only, not a medical device"
NOTICE = f"{RESEARCH_ONLY}: what follows was written by a model and may be wrong."
TEXT, REPORT, MANIFEST = "report.txt", "report.json", "run.json"
_PACKAGES = ("hsenet", "torch", "transformers", "numpy", "nibabel", "pydicom", "pynrrd", "peft")
# Marks by which a text can show in another order than it is written.
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def public_id(source: str) -> str:
    """A Hub id as it is; of a local folder its own name, not where it lies."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def model_identity(source: str, model: PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """
    Which model it was: of a Hub id the commit it was loaded from, of a folder its name and the hash of all weights as
    they were loaded. What is stored in a folder may be of other weights, so nothing of it is repeated.
    """
    if not Path(source).is_dir():
        # The cache knows which commit a branch was; its folders are called after commits.
        cached = try_to_load_from_cache(source, CONFIG_NAME, revision=revision)
        return {"id": source, "revision": Path(cached).parent.name if isinstance(cached, str) else None}
    return {"id": public_id(source), "revision": None, "weights_sha256": model_digest(model)}


def library_versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{package: installed_version(package) for package in _PACKAGES}}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def printable(text: str) -> str:
    """Without what would steer a terminal or turn the order of the words around."""
    return "".join(
        letter for letter in text if letter in "\n\t" or (unicodedata.category(letter) != "Cc" and letter not in _BIDI)
    )


def as_text(answers: list[dict[str, str]], *, with_questions: bool) -> str:
    """For people: the answers, each under its question if there is more than a report."""
    parts = [f"> {one['question'].strip()}\n{one['text']}" if with_questions else one["text"] for one in answers]
    return printable("\n\n".join(parts))


def report_folder(output: str | Path, number: int) -> Path:
    return Path(output) / f"{number:04d}"


def check_output(output: str | Path, count: int) -> None:
    """Before any work: reports are never overwritten."""
    taken = [folder.name for number in range(1, count + 1) if (folder := report_folder(output, number)).exists()]
    if taken:
        raise ValueError(f"The output folder already holds {', '.join(taken[:5])}: choose another one.")


def write_record(folder: Path, record: dict[str, Any], *, with_questions: bool) -> None:
    """`report.txt`, `report.json` and `run.json` in a folder that is there whole or not at all."""
    text = f"{NOTICE}\n\n{as_text(record['answers'], with_questions=with_questions)}\n"
    report = {name: record[name] for name in ("number", "notice", "text", "answers")}
    manifest = {name: value for name, value in record.items() if name not in ("notice", "text", "answers")}
    manifest["questions"] = [answer["question"] for answer in record["answers"]]
    manifest["report_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        (unfinished / TEXT).write_text(text, encoding="utf-8")
        for name, content in ((REPORT, report), (MANIFEST, manifest)):
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
