# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The card's snippet: a program that runs as it stands, in the folder of the model or from anywhere with a Hub id."""

import json
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedConfig

from hsenet.model_facts import Kind
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.sources import HUB_ID


TEMPLATES = Path(__file__).parent / "templates"
FROM_HUB = (
    'model_id = "{repo_id}"\n'
    "revision = HfApi().model_info(model_id).sha  # today's commit: write its 40 digits here to stay with it"
)


def usage(
    folder: Path, kind: Kind, config: PreTrainedConfig | None, record: dict[str, Any] | None, repo_id: str | None
) -> str:
    """The block of Python, with its fences."""
    values = {"hub_import": "", "pinned": "", "where": 'model_id = "."  # the folder of this card', "cached": None}
    if repo_id:
        values |= {"hub_import": "from huggingface_hub import HfApi\n", "pinned": ", revision=revision"}
        values["where"] = FROM_HUB.format(repo_id=repo_id)
    name = "retrieval" if kind.name in ("stage1", "stage2") else kind.name
    values |= {
        "adapter": lambda: _adapter(folder),
        "encoder": lambda: _encoder(config),
        "retrieval": lambda: _retrieval(folder, config),
        "report": lambda: _report(config, record),
        "part": dict,
    }[name]()
    return block(TEMPLATES / f"use_{name}.md", values)


def block(template: Path, values: dict[str, Any]) -> str:
    """A block of Python, with its fences, from its template."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values).strip()


def _adapter(folder: Path) -> dict[str, Any]:
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        return {"base": base, "base_words": "the model that the adapter was trained on"}
    if folder.resolve().parent.name == "adapters" and (folder.resolve().parents[1] / "config.json").exists():
        return {"base": "../..", "base_words": "the model without adapters, in whose folder this one lies"}
    return {"base": "BASE", "base_words": "not here: the run saved this adapter, and a model with it merged beside it"}


def _encoder(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.slice_hidden_size
    shape = ", ".join(map(str, (config.num_channels, *config.image_size)))
    return {"shape": shape, "cached": (1, 1, width) if width is not None else None}


def _retrieval(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    has_tokenizer = (folder / "processor_config.json").exists()
    cached = _cached(config.vision_config, config) if config.guidance == "slices" else None
    return {"processor": "AutoProcessor" if has_tokenizer else "AutoImageProcessor", "cached": cached}


def _report(config: PreTrainedConfig, record: dict[str, Any] | None) -> dict[str, Any]:
    prompts = record["settings"].get("model", {}).get("report_prompts") if record else None
    guided = config.local_vision_config
    cached = _cached(guided, config) if guided is not None else None
    return {"prompt": _literal((prompts or REPORT_PROMPTS)[0]), "cached": cached}


def _cached(guided: PreTrainedConfig, config: PreTrainedConfig) -> str | None:
    """The shape of slice features that have to be given, where no 2D encoder makes them."""
    if config.slice_config is not None:
        return None
    return f"(volumes, {config.num_slices}, {guided.slice_hidden_size})"


def _literal(text: str) -> str:
    """For between double quotes in Python, within one line."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("`", "'")
