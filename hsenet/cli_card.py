# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The command `hsenet card`: writes or refreshes a model's card, and says what it still lacks."""

import argparse

from hsenet.card_checks import check_model_card
from hsenet.cards import write_model_card


def add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a saved model or adapter")
    parser.add_argument("--evaluation", metavar="DIR", help="output_dir of train/evaluate.py, to enter its results")
    parser.add_argument(
        "--repo_id", metavar="OWNER/NAME", help="where it will be published: the snippet loads it there"
    )
    parser.set_defaults(run=_run)


def _run(folder: str, *, evaluation: str | None, repo_id: str | None) -> None:
    path = write_model_card(folder, repo_id=repo_id, evaluation=evaluation)
    print(f"written: {path}")
    for problem in check_model_card(path.read_text(encoding="utf-8")):
        print(f"  still to do: {problem}")
