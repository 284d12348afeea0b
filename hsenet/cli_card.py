# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The command `hsenet card`: writes or refreshes a model's card, and says what it still lacks."""

import argparse
import json as json_format

from hsenet.card_checks import check_model_card
from hsenet.cards import write_model_card


def add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a saved model or adapter")
    parser.add_argument("--evaluation", metavar="DIR", help="output_dir of train/evaluate.py, to enter its results")
    parser.add_argument(
        "--repo_id", metavar="OWNER/NAME", help="where it will be published: the snippet loads it there"
    )
    parser.add_argument("--json", action="store_true", help="what was written and what is still to do, as JSON")
    parser.set_defaults(run=_run)


def _run(folder: str, *, evaluation: str | None, repo_id: str | None, json: bool) -> None:
    path = write_model_card(folder, repo_id=repo_id, evaluation=evaluation)
    problems = check_model_card(path.read_text(encoding="utf-8"))
    if json:
        print(json_format.dumps({"written": str(path), "still_to_do": problems}, indent=2))
        return
    print(f"written: {path}")
    for problem in problems:
        print(f"  still to do: {problem}")
