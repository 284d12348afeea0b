"""Tables of results, one protocol a column: numbers that cannot be compared never stand under each other."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Result:
    """
    One number of one system.

    Args:
        system: what was scored: a model, a floor.
        score: the score's name.
        protocol: of the tally it comes from.
        low, high: its interval, if it has one.
    """

    system: str
    score: str
    value: float
    protocol: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def results_table(results: Sequence[Result]) -> str:
    """
    Markdown: a row for each system, a column for each score, and the protocol of each column below.

    Raises:
        ValueError: a column would hold two protocols, or a cell two numbers.
    """
    protocols: dict[str, str] = {}
    cells: dict[tuple[str, str], Result] = {}
    for result in results:
        if protocols.setdefault(result.score, result.protocol) != result.protocol:
            raise ValueError(
                f"{result.score} would mix protocols in one column: {protocols[result.score]} and {result.protocol}. "
                "They are not comparable: print two tables."
            )
        if cells.setdefault((result.system, result.score), result) is not result:
            raise ValueError(f"{result.system} has two values of {result.score}.")
    systems = list(dict.fromkeys(result.system for result in results))
    lines = ["| | " + " | ".join(map(as_cell, protocols)) + " |", "|---" * (len(protocols) + 1) + "|"]
    for system in systems:
        row = [str(cells.get((system, score), "–")) for score in protocols]
        lines.append(f"| {as_cell(system)} | " + " | ".join(row) + " |")
    by_protocol: dict[str, list[str]] = {}
    for score, protocol in protocols.items():
        by_protocol.setdefault(protocol, []).append(score)
    notes = [f"`{as_cell(protocol)}`: {', '.join(map(as_cell, scores))}" for protocol, scores in by_protocol.items()]
    return "\n".join([*lines, "", "Protocols: " + "; ".join(notes) + "."])


def as_cell(text: str) -> str:
    """A name for a Markdown table: types, regions and folders come from datasets and people, and stay text in it."""
    plain = html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\")
    plain = plain.replace("|", r"\|").replace("](", r"]\(").replace("`", "'")
    # Copied into a spreadsheet, such a cell would be a formula.
    return f"\\{plain}" if plain.startswith(("=", "+", "-", "@")) else plain


def plain_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown of names and numbers."""
    lines = [head, ["---"] * len(head), *([as_cell(str(cell)) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_records(results: Sequence[Result]) -> list[dict]:
    return [asdict(result) for result in results]
