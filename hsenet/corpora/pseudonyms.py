"""Patients without names in what others may see, datasets and search indexes: pseudonyms, and ages that many share."""

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import write_atomically


MAX_AGE = 90  # years; the few older patients could be told by their age
NAMES = ("volume_name", "study_id", "patient_id")


def salt_path(folder: Path) -> Path:
    """Beside the folder, not in it."""
    return folder.with_name(f"{folder.name}.salt")


def pseudonyms(folder: Path) -> Callable[[str], str]:
    """
    A keyed hash of names. Its key is made on the first call and lies in [`salt_path`], for its owner's eyes: with it,
    and only with it, a patient's number leads to the patient's rows.
    """
    path = salt_path(folder)
    if not path.exists():
        write_atomically(path, secrets.token_hex(16).encode())
        path.chmod(0o600)
    key = path.read_bytes()
    return lambda name: hashlib.blake2b(name.encode(), key=key, digest_size=8).hexdigest()


def without_names(row: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """A row with pseudonyms and, if it has an age, one of at most 90 years. Texts stay as they are."""
    changed = {column: name(row[column]) for column in NAMES if column in row}
    if row.get("age") is not None:
        changed["age"] = min(row["age"], MAX_AGE)
    return {**row, **changed}
