"""What two splits have in common and should not: patients, scans, reports."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import write_atomically
from .marks import report_key


KINDS = {
    "patient": "patients in more than one split",
    "volume": "scans with the same voxels under several names",
    "report": "reports of several studies with the same text",
}


@dataclass(frozen=True)
class Leak:
    """One patient, scan or report that is there several times.

    Args:
        kind (`str`): "patient", "volume" or "report".
        splits: where it is, sorted; several: a leak; one: a duplicate.
        names: the volumes (of a report: the studies) that share it, sorted.
    """

    kind: str
    splits: tuple[str, ...]
    names: tuple[str, ...]


def find_leaks(rows: Iterable[dict[str, Any]]) -> list[Leak]:
    """
    Args:
        rows: with `split`, `volume_name`, `study_id`, `patient_id`, `findings`, `impression` and, unless the scans
            were not hashed, `content_hash`.
    """
    shared: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for row in rows:
        split = row["split"]
        shared.setdefault(("patient", row["patient_id"]), set()).add((split, row["volume_name"]))
        shared.setdefault(("report", report_key(row)), set()).add((split, row["study_id"]))
        if row.get("content_hash"):
            shared.setdefault(("volume", row["content_hash"]), set()).add((split, row["volume_name"]))
    leaks = []
    for (kind, _), members in shared.items():
        splits = tuple(sorted({split for split, _ in members}))
        # Several scans of one patient, all in one split, are what they should be.
        if len(splits) > 1 or (len(members) > 1 and kind != "patient"):
            leaks.append(Leak(kind, splits, tuple(sorted({name for _, name in members}))))
    return sorted(leaks, key=lambda leak: (leak.kind, -len(leak.splits), leak.names))


def leakage_table(leaks: list[Leak], *, scans_hashed: bool) -> str:
    """A Markdown table of the counts."""
    lines = ["| what | across splits | within one split |", "|---|---|---|"]
    for kind, words in KINDS.items():
        found = [leak for leak in leaks if leak.kind == kind]
        across = sum(len(leak.splits) > 1 for leak in found)
        within = "" if kind == "patient" else str(len(found) - across)
        if kind == "volume" and not scans_hashed:
            across, within = "not looked for", "not looked for"
        lines.append(f"| {words} | {across} | {within} |")
    return "\n".join(lines) + "\n"


def write_leaks(path: Path, leaks: list[Leak]) -> None:
    """All of them, with the names of the volumes or studies."""
    write_atomically(path, json.dumps([asdict(leak) for leak in leaks], indent=1).encode())
