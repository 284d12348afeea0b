# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet convert` and `hsenet fingerprint`: options to the functions of conversion, and what became of it."""

import argparse
import json as json_format
from collections.abc import Callable
from pathlib import Path

import torch

from hsenet.conversion import convert_clip
from hsenet.conversion_output import REPORT_FILE, Report
from hsenet.conversion_slices import BIOMEDCLIP_ID, convert_slice_encoder
from hsenet.fingerprint import FILE, check_fingerprint, store_fingerprint
from hsenet_command import UsageError


def add_convert(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for kind, what in (
        ("stage1-clip", "HSENet's stage 1"),
        ("stage2-clip", "HSENet's stage 2 (2E3)"),
        ("m3d-clip", "M3D-CLIP"),
    ):
        clip = _add_kind(kinds, kind, what, _run_clip)
        clip.set_defaults(kind=kind)
        clip.add_argument("--tokenizer", help="the text encoder's, if it is not beside the source")
        _add_text_config(clip)
        _add_dataset(clip)
        if kind == "stage2-clip":
            _add_slices(clip)
            clip.add_argument("--teacher", metavar="DIR", help="keep the frozen stage 1 as a model of its own in DIR")
    vlm = _add_kind(kinds, "vlm", "packers and LoRA, with the encoders and the language model", _run_vlm)
    vlm.add_argument(
        "--stage2", help="stage-2 CLIP, released or converted; with its frozen stage 1 for the other encoder"
    )
    vlm.add_argument("--stage1", help="stage-1 CLIP, released or converted, if the stage-2 CLIP is without it")
    vlm.add_argument(
        "--language_model", help="the one that LoRA was trained on (default: microsoft/Phi-4-mini-instruct)"
    )
    vlm.add_argument("--adapter", metavar="NAME", help="keep LoRA and packers apart, in OUTPUT/adapters/NAME")
    vlm.add_argument("--base", help="convert the adapter only, for this base made with --adapter")
    vlm.add_argument("--lora_alpha", type=int, help="(default: 32)")
    vlm.add_argument("--packer_window_size", type=int, nargs=3, metavar=("D", "H", "W"), help="(default: 1 4 4)")
    _add_slices(vlm)
    _add_text_config(vlm)
    _add_dataset(vlm)
    for kind, what in (("biomedclip", "BiomedCLIP's 2D trunk (open_clip)"), ("vit", "a plain ViT (transformers)")):
        _add_kind(kinds, kind, what, _run_slice_encoder)


def _add_kind(kinds, name: str, what: str, run: Callable[..., None]) -> argparse.ArgumentParser:
    # Options that are not given stay out of the call: the functions have the defaults.
    parser = kinds.add_parser(name, help=what, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "source", metavar="SOURCE", help="folder, weights file, or Hub id (owner/name[/folder or file])"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: float32)"
    )
    parser.add_argument("--json", action="store_true", default=False, help="what became of each tensor, as JSON")
    parser.set_defaults(run=run)
    return parser


def _add_slices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slice_encoder",
        help=f"2D encoder: converted, BiomedCLIP's or a ViT (default: {BIOMEDCLIP_ID}); "
        '"none": leave it out, for cached slice features',
    )
    parser.add_argument("--num_slices", type=int, help="slices a volume (default: 32)")


def _add_text_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text_config", metavar="FILE", help="the text encoder's config.json, if not bert-base-uncased's"
    )


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", choices=("ct_rate", "bimcv_r"), help="whose preparation to repeat (default: ct_rate)"
    )


def add_fingerprint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a saved model")
    parser.add_argument("--check", action="store_true", help="compare with what is stored there, instead of storing")
    parser.add_argument("--json", action="store_true", help="hash, numbers, versions and difference as JSON")
    parser.set_defaults(run=_run_fingerprint)


def _run_clip(*, json: bool, **options) -> None:
    _print(options["output"], convert_clip(**_parsed(options)), json=json)


def _run_slice_encoder(*, json: bool, **options) -> None:
    _print(options["output"], convert_slice_encoder(**_parsed(options)), json=json)


def _run_vlm(*, json: bool, **options) -> None:
    from hsenet.conversion_vlm import convert_vlm, convert_vlm_adapter  # needs PEFT, which the others do not

    if "base" in options:
        if extra := sorted(set(options) - {"source", "output", "base", "lora_alpha"}):
            raise UsageError(f"With --base only the adapter is converted, so these have no use: {', '.join(extra)}.")
        _print(options["output"], convert_vlm_adapter(**options), json=json)
    elif "stage2" not in options:
        raise UsageError("Expected --stage2, which has the encoders, or --base, to convert the adapter alone.")
    else:
        _print(options["output"], convert_vlm(**_parsed(options)), json=json)


def _run_fingerprint(folder: str, *, check: bool, json: bool) -> None:
    result = check_fingerprint(folder) if check else store_fingerprint(folder)
    if json:
        print(json_format.dumps(result, indent=2))
    elif check:
        print(f"{result['hash']}: as stored, largest difference {result['largest_difference']:.1e}")
    else:
        print(result["hash"])


def _parsed(options: dict) -> dict:
    options = dict(options)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    if options.get("slice_encoder") == "none":
        options["slice_encoder"] = None
    if "text_config" in options:
        options["text_config"] = json_format.loads(Path(options["text_config"]).read_text())
    return options


def _print(output: str, report: Report, *, json: bool) -> None:
    if json:
        print((Path(output) / REPORT_FILE).read_text(), end="")
        return
    print("\n".join([*report.lines(), f"written to {output}"]))
    fingerprint = Path(output) / FILE
    if fingerprint.exists():  # an adapter alone has none
        print(f"fingerprint {json_format.loads(fingerprint.read_text())['hash']}")
