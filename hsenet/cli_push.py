# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet push`: options to [`~hsenet.publishing.push_model`] and `push_dataset`, and what became of it."""

import argparse
import json as json_format
from collections import Counter
from collections.abc import Sequence

from hsenet_command import UsageError


MOST_LISTED = 40


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder of a trained or converted model, or of a built dataset")
    parser.add_argument("repo_id", metavar="REPO", help="OWNER/NAME on the Hub; made if it does not exist")
    parser.add_argument("--dataset", action="store_true", help="DIR is a dataset (default: a model)")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: main)")
    parser.add_argument("--commit_message", metavar="TEXT", help='(default: "Upload model" or "Upload dataset")')
    parser.add_argument("--evaluation", metavar="DIR", help="of a model: what train/evaluate.py wrote about it")
    parser.add_argument(
        "--identifiers",
        metavar="FILE",
        nargs="+",
        default=[],
        help="identifiers that nothing published may hold, one a line",
    )
    parser.add_argument("--dry_run", action="store_true", help="check, and say what would go; the Hub is not asked")
    parser.add_argument("--json", action="store_true", help="the outcome as JSON")
    parser.set_defaults(run=_run_push)


def _run_push(
    folder: str,
    repo_id: str,
    *,
    dataset: bool,
    public: bool,
    revision: str | None,
    commit_message: str | None,
    evaluation: str | None,
    identifiers: Sequence[str],
    dry_run: bool,
    json: bool,
) -> None:
    # Takes seconds, which `hsenet push --help` should not.
    from hsenet.publication import dataset_publication, model_publication
    from hsenet.publishing import check_repo_id, publish

    if dataset and evaluation is not None:
        raise UsageError("--evaluation is of a model, and --dataset says that DIR is none.")
    check_repo_id(repo_id)
    kind = "dataset" if dataset else "model"
    if dataset:
        publication = dataset_publication(folder, repo_id, identifiers)
    else:
        publication = model_publication(folder, repo_id, evaluation, identifiers)
    outcome = {
        "repo_id": repo_id,
        "repo_type": kind,
        "files": list(publication.files),
        "bytes": publication.size,
        "left_out": publication.left_out,
    }
    if not dry_run:
        commit = publish(
            publication,
            repo_id,
            repo_type=kind,
            private=not public,
            revision=revision,
            commit_message=commit_message or f"Upload {kind}",
        )
        outcome |= {"revision": commit.oid, "url": commit.commit_url}
    print(json_format.dumps(outcome, indent=2) if json else "\n".join(_lines(outcome)))


def _lines(outcome: dict) -> list[str]:
    files = outcome["files"]
    lines = [f"{len(files)} files, {outcome['bytes'] / 1e6:.1f} MB:", *_listed(files)]
    if outcome["left_out"]:
        lines += [f"left out, {len(outcome['left_out'])} files:", *_listed(outcome["left_out"])]
    if "revision" not in outcome:
        return [*lines, "nothing was uploaded: --dry_run"]
    return [*lines, outcome["url"], f'pin it with revision="{outcome["revision"]}"']


def _listed(names: Sequence[str]) -> list[str]:
    """One by one; of many, how many each folder has."""
    if len(names) > MOST_LISTED:
        counts = Counter(f"{name.rpartition('/')[0] or '.'}/" for name in names)
        names = [f"{folder}: {count}" for folder, count in counts.items()]
    return [f"  {name}" for name in names]
