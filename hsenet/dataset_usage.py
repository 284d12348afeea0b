# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""How a dataset is loaded: its card's snippet, which runs in its folder or, with a Hub id, from anywhere."""

from typing import Any

from hsenet.card_usage import TEMPLATES, block


SECTION = "snippet"


def loading_section(configs: list[dict[str, Any]], *, repo_id: str | None = None, is_reference: bool = False) -> str:
    """
    Args:
        configs: of the card's metadata.
        repo_id (`str`, *optional*): where it is going to be published.
        is_reference (`bool`): the scans lie in a local copy of the corpus, not in the dataset.
    """
    splits = {config["config_name"]: [entry["split"] for entry in config["data_files"]] for config in configs}
    split = "train" if "train" in splits["reports"] else splits["reports"][0]
    values = {"split": split, "questions": "vqa" in splits, "repo_id": repo_id}
    if is_reference:
        snippet, needed = block(TEMPLATES / "load_reference.md", values), "this package, `hsenet[corpora]`"
    else:
        values["scans"] = "rows" if "volumes" in splits else "files"
        snippet, needed = block(TEMPLATES / "load_dataset.md", values), "`pip install datasets nibabel`"
    return (
        f"## How to load it\n\nNeeds {needed}.\n\n{snippet}\n\nThe training programs of hsenet, `hsenet index` and "
        "`train/evaluate.py` take the folder, or the Hub id, as `--dataset`."
    )
