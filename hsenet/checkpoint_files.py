# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Reads foreign checkpoints: configuration and tensors, from a local folder or file or from the Hub, without running
any code that they may hold."""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from hsenet.name_table import ConversionError


# In order of preference: a folder often holds the same weights twice.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model_params.bin",
    "mm_projector_and_lora.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Checkpoint:
    """
    Args:
        tensors (`dict[str, torch.Tensor]`).
        config (`dict`): of `config.json`; empty if there is none.
        folder (`Path`, *optional*): where the other files lie, such as the tokenizer's.
        label (`str`): what reports call it: the Hub id, or the name of the local file without its folder.
    """

    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    folder: Path | None = None
    label: str = "in memory"


def read_checkpoint(source: str | Path) -> Checkpoint:
    """
    Args:
        source (`str` or `Path`):
            A folder, a weights file, or a Hub id, optionally followed by a folder or file of that repository:
            `owner/name`, `owner/name/folder`, `owner/name/folder/file.bin`.

    Raises:
        [`ConversionError`]: if there are no weights, if they are incomplete, or if reading them would run code.
    """
    folder, weights, label = locate(source)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    return Checkpoint(_read_weights(folder / weights), config, folder, f"{label}: {weights}")


def locate(
    source: str | Path, weight_files: tuple[str, ...] = WEIGHT_FILES, revision: str | None = None
) -> tuple[Path, str, str]:
    """Local folder, name of the weights file in it, label; downloads from the Hub what is not local, at `revision`."""
    path = Path(source)
    if path.is_file():
        return path.parent, path.name, "local file"
    if path.is_dir():
        for name in weight_files:
            if (path / name).exists():
                return path, name, "local folder"
        raise ConversionError(
            f"Expected one of {', '.join(weight_files)} in the folder {path}, found none: give the file itself."
        )
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(/.+)?", str(source))
    if match is None:
        raise ConversionError(f"Expected a local folder or file, or a Hub id like owner/name, got {str(source)!r}.")
    return _download(match[1], (match[2] or "/")[1:], weight_files, revision)


def _download(
    repository: str, inside: str, weight_files: tuple[str, ...], revision: str | None
) -> tuple[Path, str, str]:
    """The small files beside the weights, and the first of `weight_files` that the repository has."""
    is_file = inside.endswith(WEIGHT_SUFFIXES)
    subfolder = str(Path(inside).parent if is_file else Path(inside)).strip("./")
    prefix = f"{subfolder}/" if subfolder else ""
    small = [f"{prefix}{pattern}" for pattern in ("*.json", "*.txt", "*.model", "*.jinja")]
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
    except LocalEntryNotFoundError as error:
        raise ConversionError(
            f"The Hub cannot be reached, and {repository} is not in its local cache: give a local folder or file."
        ) from error
    for name in [Path(inside).name] if is_file else weight_files:
        try:
            hf_hub_download(repository, prefix + name, revision=snapshot.name)
        except EntryNotFoundError:
            continue
        if name.endswith(".index.json"):
            for shard in _shards(snapshot / prefix / name):
                hf_hub_download(repository, prefix + shard, revision=snapshot.name)
        return snapshot / prefix, name, f"{repository}{'/' + subfolder if subfolder else ''} at {snapshot.name}"
    raise ConversionError(f"Expected one of {', '.join(weight_files)} in {repository}/{inside}, found none.")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(tensors, dict) or not tensors:
        raise ConversionError(f"Expected names with tensors in {path.name}, got {type(tensors).__name__}.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"Expected a tensor for each name in {path.name}, got {type(tensor).__name__} for {name!r}."
            )
    return dict(tensors)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path.name} is not a complete safetensors file ({error}): get it again.") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} holds more than tensors, and reading the rest could run any code that its author put there: "
            "refused. If you trust it, load it where it was made and save its state dict as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ConversionError(f"{path.name} is not a complete PyTorch file ({error}): get it again.") from error


def _shards(index: Path) -> list[str]:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ConversionError(f"{index.name} names files outside its folder: {', '.join(outside)}.")
    return names


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    places = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for shard in _shards(index):
        if not (index.parent / shard).exists():
            raise ConversionError(f"{index.name} names {shard}, which is not there: get it again.")
        read = _read_weights(index.parent / shard)
        for name in sorted({name for name, place in places.items() if place == shard} ^ set(read)):
            where = "is in the index but not in" if name not in read else "is not in the index but in"
            raise ConversionError(f"{name} {where} {shard}: get both again.")
        tensors.update(read)
    return tensors
