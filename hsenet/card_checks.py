# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a card must say before it is published."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard


OF_MODELS = (
    "Intended use",
    "What it must not be used for",
    "How to use it",
    "Model",
    "What it does to a scan",
    "Training data and licence",
    "Training",
    "Evaluation",
    "Known failures and limits",
    "Files",
    "Citation",
)
OF_DATASETS = (
    "Intended use",
    "What it must not be used for",
    "How to load it",
    "Source and licence",
    "Splits",
    "Columns",
    "What was done to the scans",
    "Left out",
    "Citation",
)
# In the metadata: a name, or a list of them.
NAMES = ("tags", "datasets", "base_model", "language", "task_categories", "size_categories")
DISCLAIMER = "Not a medical device."
LOCAL_PATH = re.compile(r"(?<![\w/:.])(/(?:home|Users|root|mnt|data|tmp|scratch|work)/[\w.-]+|[A-Z]:\\\w+|file://)")


def check_model_card(text: str) -> list[str]:
    """What keeps a model's card from being published, in words; empty: nothing."""
    return _check(text, ModelCard, OF_MODELS, ("from_pretrained", "load_adapters"), lambda metadata: [])


def check_dataset_card(text: str) -> list[str]:
    """What keeps a dataset's card from being published, in words; empty: nothing."""
    return _check(text, DatasetCard, OF_DATASETS, ("load_dataset", "load_rows"), _dataset_problems)


def snippets(text: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _check(
    text: str,
    card_class: type[RepoCard],
    sections: Iterable[str],
    loads: tuple[str, ...],
    check_metadata: Callable[[dict[str, Any]], list[str]],
) -> list[str]:
    try:
        card = card_class(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        return [f"the metadata between the --- lines cannot be read: {error}"]
    metadata = card.data.to_dict()
    headings = {match[1].strip() for match in re.finditer(r"^#+ (.+)$", card.text, re.MULTILINE)}
    problems = [f"no section {name!r}" for name in sections if name not in headings]
    if DISCLAIMER not in card.text:
        problems.append(f"it does not say {DISCLAIMER!r}")
    problems += _license_problems(metadata) + check_metadata(metadata)
    for name in NAMES:
        values = metadata.get(name, [])
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            problems.append(f"{name} of the metadata should be names, got {values}")
    if not any(call in snippet for snippet in snippets(card.text) for call in loads):
        problems.append(f"no Python snippet with {' or '.join(loads)}")
    if LOCAL_PATH.search(text):
        problems.append("it shows a path of a local folder")
    return problems


def _license_problems(metadata: dict[str, Any]) -> list[str]:
    license = metadata.get("license")
    if not license:
        return ['no license in the metadata: "other" with a license_name where there is no identifier']
    if license == "other" and not metadata.get("license_name"):
        return ['license is "other" without a license_name']
    return []


def _dataset_problems(metadata: dict[str, Any]) -> list[str]:
    missing = [
        name for name in ("pretty_name", "configs", "task_categories", "size_categories") if not metadata.get(name)
    ]
    return [f"no {name} in the metadata" for name in missing]
