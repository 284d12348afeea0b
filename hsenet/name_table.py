# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Renames a checkpoint's tensors by a table, completely or not at all.

A table is data. In its names `#` stands for a layer's number, `*` for `weight` or `bias`, `**` for any
parts; what they stand for in a source name is put at the same place in the target name.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


class ConversionError(ValueError):
    """A checkpoint that does not fit its layout."""


@dataclass(frozen=True)
class Computed:
    """Tensors that are more than renamed: `compute(*sources)` gives the targets; its docstring goes to the report."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    compute: Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Dropped:
    """
    Args:
        reason (`str`): goes to the report.
        shaped_like (`str`, *optional*):
            A tensor of the target with the same shape: the dropped one is then part of the layout and is checked for
            presence and shape like all others. `None`: it may be absent.
    """

    reason: str
    shaped_like: str | None = None


@dataclass(frozen=True)
class NameTable:
    """
    Args:
        renamed (`dict[str, str]`): source name to target name; the tensor stays as it is.
        computed (`tuple[Computed]`): everything else that goes into the target.
        dropped (`dict[str, Dropped]`): source names that the target has no use for.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    computed: tuple[Computed, ...] = ()
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def under(self, source: str, target: str) -> "NameTable":
        """The same table for tensors whose names start with `source` and become names that start with `target`."""
        return NameTable(
            {source + old: target + new for old, new in self.renamed.items()},
            tuple(
                Computed(tuple(source + n for n in row.sources), tuple(target + n for n in row.targets), row.compute)
                for row in self.computed
            ),
            {
                source + name: Dropped(row.reason, target + row.shaped_like if row.shaped_like else None)
                for name, row in self.dropped.items()
            },
        )

    def __or__(self, other: "NameTable") -> "NameTable":
        return NameTable(
            {**self.renamed, **other.renamed}, self.computed + other.computed, {**self.dropped, **other.dropped}
        )

    def rows(self) -> Iterator[Computed]:
        for source, target in self.renamed.items():
            yield Computed((source,), (target,), _unchanged)
        yield from self.computed


@dataclass
class Renaming:
    """
    Args:
        state (`dict[str, torch.Tensor]`): the target's tensors.
        mapped (`list[dict]`): for each row used, the source names, the target names and what was done.
        dropped (`dict[str, str]`): source name to reason.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    mapped: list[dict] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


def rename(
    tensors: dict[str, torch.Tensor], table: NameTable, expected: dict[str, torch.Tensor], what: str = "checkpoint"
) -> Renaming:
    """
    Args:
        tensors (`dict[str, torch.Tensor]`): the source; on the meta device too.
        table (`NameTable`): the source's layout.
        expected (`dict[str, torch.Tensor]`): the target's `state_dict()`, of which only names and shapes count.
        what (`str`): what the source is, for the error.

    Returns:
        [`Renaming`]: with every tensor of `expected` exactly once, every one of `tensors` used once or dropped.

    Raises:
        [`ConversionError`]: names every tensor that is missing, left over or wrongly shaped.
    """
    done, problems, unused = Renaming(), [], dict(tensors)
    for row in table.rows():
        for filling in _fillings(row.targets[0], expected):
            sources = [_fill(name, filling) for name in row.sources]
            targets = [_fill(name, filling) for name in row.targets]
            if absent := [name for name in sources if name not in unused]:
                problems += [f"{name} is missing" for name in absent]
                continue
            problems += _compute(row, sources, targets, unused, expected, done)
    problems += _drop(table, expected, unused, done)
    problems += [
        f"{name} of shape {tuple(tensor.shape)} is not part of this layout" for name, tensor in unused.items()
    ]
    # A target without a row is a fault of the table; if its row's sources failed, that is the problem to report.
    if not problems and (unfilled := sorted(set(expected) - set(done.state))):
        problems += [f"nothing in this layout gives {name} of the model" for name in unfilled]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise ConversionError(f"The {what} does not fit its layout in {len(problems)} place(s):\n  {shown}")
    return done


def _compute(row: Computed, sources: list, targets: list, unused: dict, expected: dict, done: Renaming) -> list[str]:
    """Moves the sources' tensors from `unused` to `done`; returns what is wrong with them."""
    inputs = [unused.pop(name) for name in sources]
    wanted = [tuple(expected[name].shape) for name in targets if name in expected]
    got = [tuple(tensor.shape) for tensor in inputs]
    error = (
        f"{' and '.join(sources)}: expected what becomes {' and '.join(targets)} of shape {_and(wanted)}, got shape "
    )
    try:
        outputs = row.compute(*inputs)
    except (RuntimeError, IndexError, ValueError) as wrong:
        return [f"{error}{_and(got)} ({wrong})"]
    if [tuple(tensor.shape) for tensor in outputs] != wanted:
        return [error + _and(got)]
    done.state.update(zip(targets, outputs, strict=True))
    done.mapped.append({"sources": sources, "targets": targets, "how": row.compute.__doc__})
    return []


def _drop(table: NameTable, expected: dict, unused: dict, done: Renaming) -> list[str]:
    problems = []
    for pattern, row in table.dropped.items():
        for filling in _fillings(row.shaped_like, expected) if row.shaped_like is not None else ():
            name, shape = _fill(pattern, filling), expected[_fill(row.shaped_like, filling)].shape
            if name not in unused:
                problems.append(f"{name} is missing")
            elif unused[name].shape != shape:
                problems.append(f"{name}: expected shape {tuple(shape)}, got {tuple(unused.pop(name).shape)}")
        for filling in list(_fillings(pattern, unused)):
            done.dropped[_fill(pattern, filling)] = row.reason
            del unused[_fill(pattern, filling)]
    return problems


def _unchanged(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """renamed"""
    return (tensor,)


def _and(shapes: list[tuple]) -> str:
    return " and ".join(map(str, shapes))


_WILDCARDS = {"#": r"(\d+)", "**": r"(.+)", "*": r"(weight|bias)"}


def _fillings(pattern: str, names: dict) -> Iterator[tuple[str, ...]]:
    """What the wildcards of `pattern` stand for in each of the names that it fits."""
    parts = re.split(r"(#|\*\*|\*)", pattern)
    expression = re.compile("".join(_WILDCARDS.get(part, re.escape(part)) for part in parts))
    for name in names:
        if match := expression.fullmatch(name):
            yield match.groups()


def _fill(pattern: str, filling: tuple[str, ...]) -> str:
    values = iter(filling)
    return re.sub(r"#|\*\*|\*", lambda _: next(values), pattern)
