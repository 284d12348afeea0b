"""Files that appear whole or not at all, and folders that one build owns."""

import json
import os
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
