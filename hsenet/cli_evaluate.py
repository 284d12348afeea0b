# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet evaluate`: `train/evaluate.py` where only the package is installed; the same settings, the same function."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field

from hsenet.arguments import parse_arguments
from hsenet.cli_scan import quiet_libraries
from hsenet.scoring.program import EvaluationArguments, evaluate
from hsenet_command import UsageError


@dataclass
class OutputArguments:
    json: bool = field(default=False, metadata={"help": "What metrics.json holds on stdout, the tables on stderr."})


def run_evaluate(argv: list[str]) -> None:
    """
    Args:
        argv: settings of [`~hsenet.scoring.program.EvaluationArguments`], and `--config FILE.yaml` with more of them.
    """
    try:
        arguments, output = parse_arguments(EvaluationArguments, OutputArguments, argv=argv, prog="hsenet evaluate")
    except ValueError as error:
        raise UsageError(str(error)) from error
    quiet_libraries(json=output.json)
    if not output.json:
        evaluate(arguments)
        return
    with redirect_stdout(sys.stderr):
        metrics = evaluate(arguments)
    if metrics is not None:
        print(metrics.read_text(), end="")
