# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet report` and `hsenet ask`: options to [`~hsenet.encoded_scan.EncodedScan`], and its texts as wanted."""

import argparse
import json as json_format
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hsenet.cli_model import add_generation_model_options, load_as_chosen, with_adapter
from hsenet.cli_scan import (
    SCAN_HELP,
    add_read_options,
    at_least_one,
    base_name,
    chosen_device,
    not_negative,
    numbered,
    read_options,
    refuse,
    say,
    without_uid,
)
from hsenet.digests import model_digest
from hsenet.encoded_scan import EncodedScan, prompt_for, read_with_warnings
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.report_record import (
    NOTICE,
    as_text,
    check_output,
    library_versions,
    model_identity,
    printable,
    public_id,
    report_folder,
    write_record,
)
from hsenet_command import UsageError
from reading_hsenet import HSENetInputError


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model that writes (stage 3): folder or Hub id")
    parser.add_argument("scans", metavar="SCAN", nargs="+", help=SCAN_HELP)
    parser.add_argument(
        "--question",
        default=REPORT_PROMPTS[0],
        metavar="TEXT",
        help=f'what asks for it (default: "{REPORT_PROMPTS[0]}")',
    )
    _add_options(parser)
    parser.set_defaults(run=_run_report)


def add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model that writes (stage 3): folder or Hub id")
    parser.add_argument("scan", metavar="SCAN", help=SCAN_HELP)
    parser.add_argument(
        "questions", metavar="QUESTION", nargs="*", help="none: one a line, from the terminal or standard input"
    )
    _add_options(parser)
    parser.set_defaults(run=_run_ask)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=at_least_one, default=256, help="length of a text (default: 256)")
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="0: the likeliest words; more: drawn (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="one line of JSON a scan, and no progress")
    parser.add_argument(
        "--output", metavar="DIR", help="keep report.txt, report.json and the manifest run.json in DIR/0001, ..."
    )
    parser.add_argument("--keep_names", action="store_true", help="put the scans' file names into JSON and manifest")
    parser.add_argument("--figure", metavar="PNG", help="slices with the patch scores over them; for one scan")
    add_generation_model_options(parser)
    add_read_options(parser)


def _run_report(model: str, scans: list[str], question: str, **options) -> int:
    return _run(model, scans, [question], with_questions=False, **options)


def _run_ask(model: str, scan: str, questions: list[str], **options) -> int:
    return _run(model, [scan], questions or None, with_questions=True, **options)


def _run(
    source: str,
    scans: list[str],
    questions: list[str] | None,
    *,
    with_questions: bool,
    json: bool,
    output: str | None,
    figure: str | None,
    keep_names: bool,
    **options,
) -> int:
    if not all(question.strip() for question in questions or ()):
        raise UsageError("a question is empty: say what is asked")
    if figure and len(scans) > 1:
        raise UsageError(f"--figure shows one scan, got {len(scans)}")
    if output:
        check_output(output, len(scans))
    writer = _load(source, json=json, with_questions=with_questions, **options)
    for question in questions or ():
        prompt_for(writer.processor, question)  # refused before a scan is read
    say(NOTICE, json=json)
    failed = 0
    for number, scan in numbered(scans, json=json):
        if len(scans) > 1 and not json:
            print(("\n" if number > 1 else "") + f"scan {number} of {len(scans)}")
        try:
            encoded, record = writer.write(number, scan, _typed() if questions is None else questions)
        except (HSENetInputError, ImportError) as error:
            failed += 1
            refuse(number, len(scans), error, json=json)
            continue
        if not record["answers"] and not sys.stdin.isatty():
            raise UsageError("no question was given, nor read from standard input")
        if keep_names:
            record["name"] = base_name(scan)
        if output:
            write_record(report_folder(output, number), record, with_questions=with_questions)
        if figure:
            _draw(encoded, figure)
        if json:
            print(json_format.dumps(record), flush=True)
    return 1 if failed else 0


@dataclass
class _Writer:
    """A loaded model, how it writes, and where its text goes."""

    model: Any
    processor: Any
    identity: dict[str, Any]
    settings: dict[str, Any]
    reading: dict[str, Any]
    json: bool
    with_questions: bool

    def write(self, number: int, source: str, questions: Iterable[str]) -> tuple[EncodedScan, dict[str, Any]]:
        begin = time.perf_counter()
        volume, warnings = read_with_warnings(source, **self.reading)
        read = time.perf_counter()
        scan = EncodedScan(self.model, self.processor, volume, warnings)
        encoded = time.perf_counter()
        for warning in warnings:
            say(f"warning: {warning}", json=self.json)
        answers = list(self._answers(scan, questions))
        seconds = {"read": read - begin, "encode": encoded - read, "write": sum(one.pop("seconds") for one in answers)}
        return scan, {
            "number": number,
            "text": as_text(answers, with_questions=self.with_questions),
            "answers": answers,
            "notice": NOTICE,
            "model": self.identity,
            "input": {"sha256": scan.sha256, **scan.geometry},
            "settings": {**self.settings, "reading": without_uid(self.reading)},
            "versions": library_versions(),
            "warnings": scan.warnings,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }

    def _answers(self, scan: EncodedScan, questions: Iterable[str]) -> Iterator[dict[str, Any]]:
        is_typed = not isinstance(questions, list)
        for question in questions:
            begin = time.perf_counter()
            try:
                text = self._show(scan, question, repeat=self.with_questions and not is_typed)
            except ValueError as error:
                if not is_typed:
                    raise
                print(f"hsenet: {error}", file=sys.stderr)  # there may be another question
                continue
            yield {"question": question, "text": text, "seconds": time.perf_counter() - begin}

    def _show(self, scan: EncodedScan, question: str, *, repeat: bool) -> str:
        torch.manual_seed(self.settings["seed"])  # an answer does not depend on those before it
        drawn = {"do_sample": False}
        if self.settings["temperature"]:
            drawn = {"do_sample": True, "temperature": self.settings["temperature"]}
        settings = {"max_new_tokens": self.settings["max_new_tokens"], **drawn}
        if self.json:
            return scan.ask(question, **settings)
        if repeat:
            print(printable(f"> {question.strip()}"))
        pieces = []
        for piece in scan.stream(question, **settings):
            print(printable(piece), end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)


def _load(
    source: str,
    *,
    json: bool,
    with_questions: bool,
    device: str | None,
    dtype: str | None,
    load_in: str | None,
    revision: str | None,
    adapter: str | None,
    trust_remote_code: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    **options,
) -> _Writer:
    where = chosen_device(device)
    model, processor = load_as_chosen(
        source,
        where,
        dtype=dtype,
        load_in=load_in,
        adapter=adapter,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    identity = model_identity(source, model, revision)
    if adapter:
        model = with_adapter(model, adapter)
        identity |= {"adapter": public_id(adapter), "merged_weights_sha256": model_digest(model)}
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "device": _device_name(where),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_in": load_in,
        "trust_remote_code": trust_remote_code,
    }
    return _Writer(model, processor, identity, settings, read_options(options), json, with_questions)


def _device_name(device: torch.device) -> str:
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _typed() -> Iterator[str]:
    """Questions as they are typed or piped in, one a line; an empty line at a terminal ends them."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (at_terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _draw(scan: EncodedScan, path: str) -> None:
    from hsenet.visualisation import save_patch_scores  # needs matplotlib

    if scan.patch_scores is None:
        raise ValueError("This model has no slice guidance, so it gives no patch scores: leave --figure out.")
    save_patch_scores(scan.pixel_values, scan.patch_scores, path)
