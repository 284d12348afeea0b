# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet evaluate`: `train/evaluate.py` where only the package is installed; the same settings, the same function."""

from hsenet.arguments import parse_arguments
from hsenet.scoring.program import EvaluationArguments, evaluate
from hsenet_command import UsageError


def run_evaluate(argv: list[str]) -> None:
    """
    Args:
        argv: settings of [`~hsenet.scoring.program.EvaluationArguments`], and `--config FILE.yaml` with more of them.
    """
    try:
        (arguments,) = parse_arguments(EvaluationArguments, argv=argv, prog="hsenet evaluate")
    except ValueError as error:
        raise UsageError(str(error)) from error
    evaluate(arguments)
