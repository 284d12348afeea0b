# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Cards that programs and people write together: marked sections are the programs', all else is the people's.

Of the metadata, the card remembers in a comment what programs wrote: a value that is no longer the same is a person's.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.utils import yaml_dump

from hsenet.digests import digest


SECTION = re.compile(
    r"<!-- (?P<name>[a-z][a-z ]*): written by [^>]*-->\n(?P<body>.*?)\n<!-- end of (?P=name) -->", re.DOTALL
)
METADATA = re.compile(r"\n*<!-- metadata written by hsenet: (\{.*?\}) -->\n*", re.DOTALL)
# What PEFT leaves beside an adapter for somebody to fill in.
EMPTY_FORM = "# Model Card for Model ID"


def marked(name: str, body: str) -> str:
    note = "written by hsenet; what stands outside of such marks is kept"
    return f"<!-- {name}: {note} -->\n{body}\n<!-- end of {name} -->"


def put_sections(text: str, sections: dict[str, str]) -> str:
    """`text` with each section in place of the one of that name; a new one goes after the one before it."""
    before = None
    for name, body in sections.items():
        found = {match["name"]: match for match in SECTION.finditer(text)}
        section = marked(name, body.strip("\n"))
        if name in found:
            start, end = found[name].span()
            text = text[:start] + section + text[end:]
        elif before in found:
            end = found[before].end()
            text = f"{text[:end]}\n\n{section}{text[end:]}"
        elif before is None and found:
            start = min(match.start() for match in found.values())
            text = f"{text[:start]}{section}\n\n{text[start:]}"
        else:
            text = f"{text.rstrip()}\n\n{section}\n".lstrip("\n")
        before = name
    return text


def sections_of(text: str) -> dict[str, str]:
    """Name -> what the section says."""
    return {match["name"]: match["body"] for match in SECTION.finditer(text)}


def own_text(text: str) -> str:
    """What people wrote: without the marked sections."""
    return METADATA.sub("\n", SECTION.sub("", text))


def has_own_title(card: RepoCard | None) -> bool:
    """Whether a person gave the card its title."""
    return card is not None and re.search(r"^# ", own_text(card.text), re.MULTILINE) is not None


def read_card(path: Path, card_class: type[RepoCard]) -> RepoCard | None:
    """
    The card at `path`; `None` if there is none, or only an empty form.

    Raises:
        ValueError: its metadata cannot be read.
    """
    if not path.exists():
        return None
    try:
        card = card_class(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The metadata between the --- lines of README.md cannot be read: {error}") from error
    return None if EMPTY_FORM in card.text else card


def update_card(old: RepoCard | None, metadata: dict[str, Any], sections: dict[str, str]) -> str:
    """
    The whole file: the old card, if any, with these sections and metadata.

    Args:
        metadata: as the YAML is to hold it. Values that a person changed, added or took away since stay as they are.
        sections: name -> Markdown, in the order that a new card has.
    """
    text = old.text if old is not None else ""
    remembered = METADATA.search(text)
    written = json.loads(remembered[1]) if remembered else {}
    present = old.data.to_dict() if old is not None else {}
    values = {name: value for name, value in present.items() if written.get(name) != digest(value)}
    own = {name for name, value in metadata.items() if name not in values and (name in present or name not in written)}
    values |= {name: metadata[name] for name in own}
    # In a new card's order; then what people added.
    values = {name: values[name] for name in (*metadata, *values) if name in values}
    comment = json.dumps({name: digest(values[name]) if name in own else "" for name in metadata})
    text = METADATA.sub("\n", put_sections(text, sections)).strip("\n")
    head = yaml_dump(values, sort_keys=False).strip()
    return f"---\n{head}\n---\n\n{text}\n\n<!-- metadata written by hsenet: {comment} -->\n"
