# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Which files of a model's folder are the model, and whether they are all there and load."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import is_accelerate_available, logging

import modeling_hsenet


CARD = "README.md"
# Nothing else of a folder is published: not checkpoints, caches, scans, tables, logs of trackers, or what a person
# left there.
MODEL_FILES = (
    CARD,
    "LICENSE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "*_hsenet.py",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "adapters/*/adapter_config.json",
    "adapters/*/adapter_model.safetensors",
    "adapters/*/base.json",
    "adapters/*/conversion.json",
    "fingerprint.json",
    "conversion.json",
    # What a run records of itself, and its evaluation.
    "run_config.yaml",
    "environment.json",
    "data.json",
    "log.jsonl",
    "curves.png",
    "metrics.json",
    "model_index.json",
    "table.md",
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_TYPES = ("hsenet", "hsenet_clip", "hsenet_vision")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path, with "/" between its parts, is one of the patterns; `*` stands for one part or some of it."""
    parts = name.split("/")
    return any(
        len(parts) == pattern.count("/") + 1 and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def model_problems(folder: Path, *, same_code: bool = True) -> list[str]:
    """
    What a stranger would lack, in words; empty if the folder is complete and loads.

    The model is built without memory for its weights (on the meta device): their names and shapes are compared with
    those of the files.

    Args:
        same_code (`bool`): whether the code that lies beside the weights has to be the installed package's.
    """
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        return [
            "this is an adapter, which nobody can use without its base: publish the folder of the whole model (stage "
            "3 leaves one with the adapter merged), or save the base, put the adapter into its folder adapters/NAME, "
            "and publish that"
        ]
    if not (folder / "config.json").exists():
        return ["there is no config.json: expected a folder that `save_pretrained` wrote (a dataset needs --dataset)"]
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") not in MODEL_TYPES:
        expected = ", ".join(MODEL_TYPES)
        return [f"config.json says model_type {config.get('model_type')!r}: expected one of {expected}"]
    problems = [*(_code_problems(folder, config) if same_code else ()), *_weight_problems(folder)]
    if config["model_type"] != "hsenet_vision":
        problems += _missing(folder, "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    if config["model_type"] == "hsenet":
        problems += _missing(folder, "chat_template.jinja", "generation_config.json")
    for adapter in sorted(folder.glob("adapters/*/")):
        inside = f"adapters/{adapter.name}"
        problems += _missing(folder, f"{inside}/adapter_config.json", f"{inside}/adapter_model.safetensors")
    return problems or _loading_problems(folder, config["model_type"])


def _missing(folder: Path, *names: str) -> list[str]:
    return [f"{name} is missing" for name in names if not (folder / name).is_file()]


def _code_problems(folder: Path, config: dict) -> list[str]:
    """The Hub files that `auto_map` needs are there, and all that are there are the installed package's."""
    if not {"AutoConfig", "AutoModel"} <= config.get("auto_map", {}).keys():
        return ["config.json has no auto_map, without which nobody can load it: save the model with this package"]
    needed, package = set(), Path(modeling_hsenet.__file__).parent
    for name in {reference.split(".")[0] for reference in _references(folder)}:
        module = package / f"{name}.py"
        if not module.exists():
            return [f"auto_map names {name}.py, which this package does not have"]
        needed |= {module.name, *(Path(path).name for path in get_relative_import_files(module))}
    problems = _missing(folder, *sorted(needed))
    for path in sorted(folder.glob("*_hsenet.py")):
        own = package / path.name
        if not own.exists() or own.read_bytes() != path.read_bytes():
            problems.append(
                f"{path.name} is not the installed package's: load the model and save it again, or install the "
                "version that saved it"
            )
    return problems


def _references(folder: Path) -> set[str]:
    """`module.Class` of all auto_maps and pipelines in the folder."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            for name, inside in value.items():
                if name == "auto_map":
                    both = (
                        one for entry in inside.values() for one in (entry if isinstance(entry, list) else [entry])
                    )
                    found.update(one.split("--")[-1] for one in both if one)
                elif name == "custom_pipelines":
                    found.update(pipeline["impl"] for pipeline in inside.values())
                else:
                    collect(inside)

    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            collect(json.loads((folder / name).read_text()))
    return found


def _weight_files(folder: Path) -> list[str]:
    """Of the model itself, in one file or in shards."""
    if (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [SINGLE]


def _weight_problems(folder: Path) -> list[str]:
    names = _weight_files(folder)
    here = {path.name for path in folder.glob("model*.safetensors")}
    if problems := _missing(folder, *names):
        return problems
    if extra := sorted(here - set(names)):
        return [
            f"{', '.join(extra)} does not belong to the weights that {INDEX} names: delete what is not the model's"
        ]
    problems = []
    for name in names:
        try:
            with safe_open(folder / name, "pt") as file:
                file.keys()
        except SafetensorError:
            problems.append(f"{name} is not a whole safetensors file")
    return problems


def _loading_problems(folder: Path, model_type: str) -> list[str]:
    """What the installed classes say when they load it."""
    if not is_accelerate_available():
        raise ImportError("A model is checked with accelerate before it goes to the Hub: pip install hsenet[push]")
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(folder)
        _, report = AutoModel.from_pretrained(folder, device_map="meta", output_loading_info=True)
        if model_type != "hsenet_vision":
            AutoProcessor.from_pretrained(folder)
        if model_type == "hsenet":
            GenerationConfig.from_pretrained(folder)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, HTTPError) as error:
        words = " ".join(str(error).split())
        return [f"it does not load: {words[:300].rstrip('.')}"]
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    wrong = {kind: names for kind, names in report.items() if names}
    return [
        f"the weights have {kind.replace('_', ' ')}: {sorted(map(str, names))[:5]}" for kind, names in wrong.items()
    ]
