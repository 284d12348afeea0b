# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What the commands about scans share: options for the model and for reading, progress, and how a refusal is told."""

import argparse
import json as json_format
import logging as python_logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging


SCAN_HELP = "NIfTI or NRRD file, folder or zip of a DICOM CT series"
# Options of the reader, which stay out of the call where they are not given.
READ_OPTIONS = (
    "hu_source",
    "rescale",
    "hu_check",
    "series",
    "frame",
    "resample",
    "nan_to",
    "assume_orientation",
    "allow_derived",
    "max_bytes",
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="COMMIT", help="of the model on the Hub: branch, tag or commit")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the accelerator, if there is one)")


def add_read_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "reading", "what a file may leave open; by default the reader refuses rather than guesses"
    )
    missing = argparse.SUPPRESS
    group.add_argument(
        "--hu_source",
        choices=("header", "metadata", "identity", "ct-rate-v1", "ct-rate-v2"),
        default=missing,
        help="what turns stored values into HU (default: header)",
    )
    group.add_argument("--rescale", type=float, nargs=2, metavar=("SLOPE", "INTERCEPT"), default=missing)
    group.add_argument(
        "--hu_check", choices=("raise", "warn"), default=missing, help="values unlike HU (default: raise)"
    )
    group.add_argument(
        "--series", type=_series, default=missing, help='its number in the error that lists them, UID, or "largest"'
    )
    group.add_argument("--frame", type=int, default=missing, help="of a 4D NIfTI file, from 0")
    group.add_argument(
        "--resample", action="store_true", default=missing, help="interpolate tilted, missing or uneven slices"
    )
    group.add_argument(
        "--nan_to", type=float, metavar="HU", default=missing, help="in place of NaN and infinite voxels"
    )
    group.add_argument("--assume_orientation", metavar="LPS", default=missing, help="for NIfTI files without one")
    group.add_argument(
        "--allow_derived", action="store_true", default=missing, help="read derived or strongly compressed DICOM"
    )
    group.add_argument("--max_bytes", type=int, default=missing, help="of one file or archive, unpacked")


def read_options(options: dict[str, Any]) -> dict[str, Any]:
    """The reader's options, taken out of all."""
    taken = {name: options.pop(name) for name in READ_OPTIONS if name in options}
    if "rescale" in taken:
        taken["rescale"] = tuple(taken["rescale"])
    return taken


def without_uid(reading: dict[str, Any]) -> dict[str, Any]:
    """For a record: the identifier of a series is one of a patient."""
    is_uid = isinstance(reading.get("series"), str) and reading["series"] != "largest"
    return {**reading, "series": "by its UID"} if is_uid else reading


def chosen_device(name: str | None) -> torch.device:
    try:
        if name is not None:
            torch.empty(0, device=name)
            return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device {name} cannot be used here: {reason}. {_usable_devices()}") from None
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _usable_devices() -> str:
    if not torch.accelerator.is_available():
        return "No GPU was found: expected cpu, or leave --device out."
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    return f"Expected cpu or {kind}, of which {count} can be used, the first as {kind}:0."


def quiet_libraries(*, json: bool) -> None:
    """
    Bars only for a person who watches; what a library has to warn of is no part of what a command says.

    Every command begins with it.
    """
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    if json or not sys.stderr.isatty():
        logging.disable_progress_bar()  # the package's own and the Hub client's too
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is imported, which is later


def say(message: str, *, json: bool) -> None:
    """Not a part of the output: on stderr, and for people only."""
    if not json:
        print(message, file=sys.stderr, flush=True)


def numbered(scans: Iterable[str], *, json: bool) -> Iterator[tuple[int, str]]:
    """Scans from 1, with a bar where their texts do not already show on the same terminal."""
    scans = list(scans)
    hidden = json or len(scans) == 1 or sys.stdout.isatty() or not sys.stderr.isatty()
    yield from enumerate(tqdm(scans, "scans", disable=hidden), start=1)


def refuse(number: int, count: int, error: Exception, *, json: bool) -> None:
    """Names the scan by its number: its file name may be a patient's."""
    message = with_options(str(error))
    if json:
        content = {"number": number, "error": {"type": type(error).__name__, "message": message}}
        print(json_format.dumps(content), flush=True)
    print(f"hsenet: scan {number} of {count}: {message}", file=sys.stderr, flush=True)


def with_options(message: str) -> str:
    """What the reader says of its arguments, of the command's options: `hu_check='warn'` is `--hu_check warn`."""
    value = r"True\b|'(?P<word>[^']*)'|\((?P<first>\w+), (?P<second>\w+)\)|(?P<other>-?\w+)"

    def option(match: re.Match) -> str:
        return " ".join([f"--{match['name']}", *filter(None, match.group("word", "first", "second", "other"))])

    return re.sub(rf"\b(?P<name>{'|'.join(READ_OPTIONS)})=(?:{value})?", option, message)


def base_name(scan: str) -> str:
    return Path(scan).resolve().name


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def not_negative(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


def _series(text: str) -> int | str:
    return int(text) if text.isdigit() else text
