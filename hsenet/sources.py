# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Where a model comes from: the dataset it was trained on and the models it started from, by their own cards.

A run records this when it starts, while it still knows where they lie; a card is written from the record. What a
source's card does not say is unknown, and a card says so.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard

from hsenet.card_marks import read_card


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DATASET = "dataset"
# Settings of the training programs that name a model to start from.
MODELS = ("stage1", "stage2", "text_encoder", "slice_encoder", "language_model", "m3d_clip")
KEPT = ("pretty_name", "license", "license_name", "license_link", "language", "tags", "datasets", "base_model")


def sources_of(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Args:
        settings (`dict`): groups of settings of a run, `data` and `model` among them, with paths as they are.

    Returns:
        `dict`: "dataset" and each model to what its card says of it, `hub_id` for what lies on the Hub; nothing of
        where it lies here.
    """
    names = {DATASET: settings.get("data", {}).get(DATASET)}
    names |= {name: settings.get("model", {}).get(name) for name in MODELS}
    return {name: _source(name, str(source)) for name, source in names.items() if source}


def _source(name: str, source: str) -> dict[str, Any]:
    card_class = DatasetCard if name == DATASET else ModelCard
    folder = Path(source)
    if folder.is_dir():
        card = read_card(folder / "README.md", card_class)
        given = {"learned_from": names} if (names := _learned_from(folder)) else {}
    elif HUB_ID.fullmatch(source):
        card, given = _hub_card(source, card_class), {"hub_id": source}
    else:
        return {}
    said = card.data.to_dict() if card is not None else {}
    return given | {key: said[key] for key in KEPT if said.get(key)}


def _learned_from(folder: Path) -> list[str]:
    """The datasets, by name, of the run that made a model and of the runs before it."""
    record = folder / "run_config.yaml"
    sources = (yaml.safe_load(record.read_text()) or {}).get("sources", {}) if record.exists() else {}
    names = [_shown(sources[DATASET])] if DATASET in sources else []
    names += [name for source in sources.values() for name in source.get("learned_from", [])]
    return list(dict.fromkeys(names))


def _shown(source: dict[str, Any]) -> str:
    return source.get("hub_id") or source.get("pretty_name") or "local, without a name on a card"


def _hub_card(repo_id: str, card_class: type[RepoCard]) -> RepoCard | None:
    try:
        return card_class.load(repo_id, ignore_metadata_errors=True)
    except (OSError, ValueError):  # no network, no card, or one that cannot be read
        return None


def license_of(sources: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The metadata of a model made of these: their licence if all have the same one, else "other"."""
    licenses = {source.get("license") for source in sources.values()}
    if len(licenses) == 1 and (license := licenses.pop()) not in (None, "other", "unknown"):
        return {"license": license}
    return {"license": "other", "license_name": "see-training-data"}


def hub_ids(sources: dict[str, dict[str, Any]], *, datasets: bool) -> list[str]:
    """Of all that is on the Hub, as the metadata's `datasets` or `base_model` have it; of bases, their own too."""
    found = []
    for name, source in sources.items():
        if (name == DATASET) == datasets and "hub_id" in source:
            found.append(source["hub_id"])
        inherited = source.get("datasets" if datasets else "base_model", []) if name != DATASET else []
        found += [inherited] if isinstance(inherited, str) else inherited
    return list(dict.fromkeys(found))


def is_synthetic(sources: dict[str, dict[str, Any]]) -> bool:
    return "synthetic" in sources.get(DATASET, {}).get("tags", [])


def source_rows(sources: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """For a table: what it was for, its name, its licence, what it had learned from."""
    rows = []
    for name, source in sources.items():
        license = source.get("license", "unknown: its card does not say, or there is none")
        if source.get("license_name"):
            license += f" ({source['license_name']})"
        of_card = source.get("datasets", [])
        learned = source.get("learned_from") or ([of_card] if isinstance(of_card, str) else of_card)
        origin = "" if name == DATASET else ", ".join(learned) or "unknown"
        rows.append((name.replace("_", " "), _shown(source), license, origin))
    return rows
