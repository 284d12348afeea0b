"""Files that appear whole or not at all, folders that one build owns, and their upload."""

import json
import os
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write under another name, then rename: `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = partial_name(path)
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def partial_name(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def claim_folder(output: Path, parameters: dict) -> None:
    """Note the parameters in build.json, or check that an earlier build of this folder had the same."""
    note = output / "build.json"
    parameters = json.loads(json.dumps(parameters))  # as they come back: tuples are lists
    if note.exists():
        earlier = json.loads(note.read_text())
        if earlier != parameters:
            raise SystemExit(
                f"{output} was built with {earlier}, and you ask for {parameters}. "
                "Choose another --output, repeat the earlier parameters, or delete the folder."
            )
    elif output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output} is not empty and holds no build.json: choose another --output.")
    else:
        write_atomically(note, json.dumps(parameters, indent=2).encode())
    for leftover in output.rglob(".*.partial"):
        leftover.unlink()


def push(folder: Path, repository: str, patterns: Sequence[str] | None = None, *, private: bool) -> None:
    """Upload the files of a dataset folder that match `patterns`, all if None."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, repo_type="dataset", exist_ok=True, private=private)
    allowed = None if patterns is None else list(patterns)
    api.upload_folder(folder_path=folder, repo_id=repository, repo_type="dataset", allow_patterns=allowed)
