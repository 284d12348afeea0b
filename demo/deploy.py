# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Puts the page on the Hub as a Space, private unless told otherwise, or into a folder to look at first.

    python demo/deploy.py your-name/hsenet-demo --model your-name/hsenet-reports
    python demo/deploy.py --folder space

A Space has its files in one folder and installs only what `requirements.txt` names: this package's code goes along, as
it is in this checkout.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from hsenet.publication import Publication, PublishingError
from hsenet.publishing import publish_space


ROOT = Path(__file__).parents[1]
PAGE = ("*.py", "style.css", "README.md", "requirements.txt")
PACKAGE = ("hsenet/**/*.py", "hsenet/templates/*.md")
OURS = ("*.py", *(f"hsenet/{'*/' * depth}*" for depth in range(4)))  # deleted there when gone here


def collect(folder: Path) -> None:
    """All files of the Space, into a new folder; nothing else that may lie beside them."""
    paths = [path for pattern in PAGE for path in (ROOT / "demo").glob(pattern) if path.name != "deploy.py"]
    targets = {path: path.name for path in [*paths, *ROOT.glob("*_hsenet.py"), ROOT / "LICENSE", ROOT / "NOTICE.md"]}
    for pattern in PACKAGE:
        targets |= {path: path.relative_to(ROOT) for path in ROOT.glob(pattern)}
    for path, target in targets.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / target)


def deploy(repo_id: str, model: str, revision: str | None, private: bool) -> str:
    """Makes the Space if there is none, sets its model, uploads all in one commit; returns the commit's address."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "space")
        collect(folder)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        variables = {"HSENET_MODEL": model, "HSENET_REVISION": revision}
        commit = publish_space(Publication(files, [], OURS), repo_id, variables, private=private)
    return commit.commit_url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", nargs="?", help="OWNER/NAME of the Space")
    parser.add_argument("--model", help="Hub id of the model that writes")
    parser.add_argument("--revision", help="of the model: the commit to load")
    parser.add_argument("--public", action="store_true", help="the Space is, or may be made, open to anybody")
    parser.add_argument("--folder", type=Path, help="write the files to this new folder and upload nothing")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        if arguments.folder.exists():
            parser.error("--folder exists: expected the name of a new folder")
        collect(arguments.folder)
        return
    if arguments.repo_id is None or arguments.model is None:
        parser.error("expected OWNER/NAME of the Space and --model, or --folder")
    try:
        print(deploy(arguments.repo_id, arguments.model, arguments.revision, not arguments.public))
    except PublishingError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
