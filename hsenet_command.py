# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The command `hsenet`: which commands there are, and how each of them ends.

It lies outside of the package, whose import takes seconds (PyTorch, transformers): `hsenet --help` should not. Each
command's options are in `hsenet/cli_NAME.py`, which is imported when the command is called.
"""

import argparse
import os
import sys
from importlib.metadata import version
from pkgutil import resolve_name


# Name: what adds its options to a parser, and help.
COMMANDS = {
    "report": ("hsenet.cli_report:add_report", "the report of one or more scans"),
    "ask": ("hsenet.cli_report:add_ask", "questions about one scan, which is encoded once"),
    "serve": ("hsenet.cli_serve:add_serve", "questions about scans over HTTP, in the format of OpenAI's chat"),
    "embed": ("hsenet.cli_embed:add_embed", "embeddings of scans and texts, and how alike they are"),
    "evaluate": ("hsenet.cli_evaluate:run_evaluate", "scores of trained models, each beside its floors"),
    "doctor": ("hsenet_doctor:add_doctor", "what is installed, whether a model is whole, and whether all works"),
    "convert": ("hsenet.cli_convert:add_convert", "released weights to a folder that AutoModel loads"),
    "fingerprint": ("hsenet.cli_convert:add_fingerprint", "a short hash of what a saved model computes"),
    "card": ("hsenet.cli_card:add_card", "a model's card, from what lies beside the weights"),
    "index": ("hsenet.cli_index:add_index", "embeddings of a dataset's volumes and reports, to search"),
    "search": ("hsenet.cli_index:add_search", "volumes or reports of an index like a text, a volume or both"),
    "push": ("hsenet.cli_push:add_push", "a model or a dataset to the Hub, whole and private"),
}
# Commands that read their options themselves: `evaluate` has those of its settings and a file with more.
OWN_OPTIONS = ("evaluate",)
# Of packages that are not always there: the extra that installs them.
EXTRAS = {
    "accelerate": "train",
    "bitsandbytes": "quantization",
    "datasets": "train",
    "evaluate": "eval",
    "faiss": "search",
    "fastapi": "serve",
    "fsspec": "train",
    "matplotlib": "figures",
    "nltk": "eval",
    "nrrd": "nrrd",
    "peft": "convert",
    "psutil": "train",
    "pyarrow": "train",
    "pydicom": "dicom",
    "rouge_score": "eval",
    "sacrebleu": "eval",
    "uvicorn": "serve",
    "yaml": "train",
}
INTERRUPTED, USAGE = 130, 2  # as shells have it, and argparse


class UsageError(ValueError):
    """Options that do not go together."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all done, 1 not all done, 2 wrong usage (raised by argparse as `SystemExit`), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("hsenet", description="3D CT vision-language models. Not a medical device.")
    parser.add_argument("--version", action="version", version=f"hsenet {version('hsenet')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    try:
        if argv[:1] and argv[0] in OWN_OPTIONS:
            return resolve_name(COMMANDS[argv[0]][0])(argv[1:]) or 0
        for name, (add_options, what) in COMMANDS.items():
            command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
            if argv[:1] == [name]:
                resolve_name(add_options)(command)
        options = vars(parser.parse_args(argv))
        run = options.pop("run")
        if run.__module__.startswith("hsenet."):  # `doctor` asks first whether the libraries can be imported
            resolve_name("hsenet.cli_scan:quiet_libraries")(json=options.get("json", False))
        return run(**options) or 0
    except UsageError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        return _failed(_missing(error))
    except BrokenPipeError:  # whoever read our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)


def _failed(message: str, code: int = 1) -> int:
    print(f"hsenet: {message}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError) -> str:
    cause = error
    while cause is not None:  # transformers raises this one for all that went wrong while it was imported
        if "torchvision::" in str(cause):
            return "torchvision does not fit PyTorch, so that transformers cannot be imported: see `hsenet doctor`."
        cause = cause.__cause__
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return str(error)
    return f'This command needs {package}, which is not installed: pip install "hsenet[{EXTRAS[package]}]".'


if __name__ == "__main__":
    # The commands raise the `UsageError` of the module that they import, which this file under its other name is not.
    sys.exit(resolve_name("hsenet_command:main")())
