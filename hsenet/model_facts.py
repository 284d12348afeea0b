# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a saved model is, read from its configuration, its processor's settings and its files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from processing_hsenet import HSENetImageProcessor


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# First parts of the tensors' names, and what they are part of.
PARTS = {
    "model.global_encoder": "global 3D encoder",
    "model.local_encoder": "local 3D encoder (2E3)",
    "vision_model": "3D encoder",
    "model.slice_encoder": "2D slice encoder",
    "slice_encoder": "2D slice encoder",
    "text_model": "text encoder",
    "model.multi_modal_projector": "packers",
    "model.language_model": "language model",
    "lm_head": "language model",
    "visual_projection": "projections",
    "text_projection": "projections",
    "logit_scale": "projections",
}


@dataclass(frozen=True)
class Kind:
    """
    Args:
        name (`str`): "stage1", "stage2", "report", "encoder", "part" (of transformers' own classes) or "adapter".
        title (`str`): the card's first line.
        task (`str`, *optional*): the Hub's `pipeline_tag`.
        library (`str`): the Hub's `library_name`.
    """

    name: str
    title: str
    task: str | None
    library: str = "transformers"


def read_config(folder: Path) -> PreTrainedConfig | None:
    """The model's configuration; `None` in the folder of an adapter.

    Raises:
        FileNotFoundError: there is neither a model nor an adapter.
    """
    if (folder / "config.json").exists():
        # Told not to trust: the package's own classes are registered, and no other code is wanted.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if (folder / "adapter_config.json").exists():
        return None
    raise FileNotFoundError("Expected a saved model or adapter: there is no config.json and no adapter_config.json.")


def kind_of(config: PreTrainedConfig | None) -> Kind:
    if config is None:
        return Kind("adapter", "HSENet adapter: LoRA and packers", None, "peft")
    if config.model_type == "hsenet":
        return Kind("report", "HSENet: reports and answers from chest CT", "image-text-to-text")
    if config.model_type == "hsenet_clip" and config.guidance == "none":
        return Kind("stage1", "HSENet stage 1: CT volumes and reports in one space", "feature-extraction")
    if config.model_type == "hsenet_clip":
        return Kind("stage2", "HSENet stage 2 (2E3): CT volumes and reports in one space", "feature-extraction")
    if config.model_type == "hsenet_vision":
        return Kind("encoder", "HSENet vision encoder", "image-feature-extraction")
    return Kind("part", f"A part of HSENet: {config.model_type}", None)


def tensors_of(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and type of every tensor in the folder's safetensors files, without reading their values."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                piece = file.get_slice(name)
                tensors[name] = (tuple(piece.get_shape()), piece.get_dtype())
    return tensors


def part_sizes(tensors: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, int]:
    """Parameters of each part, in the order of the computation."""
    counts: Counter[str] = Counter()
    for name, (shape, _) in tensors.items():
        size = 1
        for length in shape:
            size *= length
        if ".lora_" in name:
            counts["LoRA of the language model"] += size
        else:
            plain = name.removeprefix("base_model.model.")
            counts[next((part for start, part in PARTS.items() if plain.startswith(start)), "all")] += size
    order = (*dict.fromkeys(PARTS.values()), "LoRA of the language model", "all")
    return {part: counts[part] for part in order if part in counts}


def part_words(config: PreTrainedConfig | None) -> dict[str, str]:
    """Part -> what it is made of."""
    if config is None:
        return {}
    if config.model_type == "hsenet_vision":
        return {"all": _vit(config)}
    if config.model_type not in ("hsenet", "hsenet_clip"):
        return {"all": _transformer(config)}
    words = {}
    if config.slice_config is not None:
        words["2D slice encoder"] = f"{_vit(config.slice_config)}; {config.num_slices} slices a volume; frozen"
    if config.model_type == "hsenet_clip":
        words |= {"3D encoder": _vit(config.vision_config), "text encoder": _transformer(config.text_config)}
        return words | {"projections": f"to {config.projection_dim} shared dimensions, and the temperature"}
    if config.vision_config is not None:
        words["global 3D encoder"] = _vit(config.vision_config)
    if config.local_vision_config is not None:
        words["local 3D encoder (2E3)"] = _vit(config.local_vision_config)
    window = _by(config.packer_window_size)
    words["packers"] = f"{config.projector}: {window} patches a token, {config.image_seq_length} tokens a volume"
    return words | {"language model": _transformer(config.text_config)}


def _vit(config: PreTrainedConfig) -> str:
    words = (
        f"ViT, {_by(config.image_size)} voxels in patches of {_by(config.patch_size)}, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads"
    )
    if config.slice_hidden_size is not None:
        words += f"; patches weighed by slice features of width {config.slice_hidden_size}"
    return words


def _transformer(config: PreTrainedConfig) -> str:
    config = config.get_text_config()
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.vocab_size} tokens"
    )


def read_image_processor(folder: Path) -> HSENetImageProcessor | None:
    if any((folder / name).exists() for name in PROCESSOR_FILES):
        return HSENetImageProcessor.from_pretrained(folder)
    return None


def input_contract(processor: HSENetImageProcessor) -> list[tuple[str, str]]:
    """What becomes of a scan before the model sees it, setting by setting."""
    rows = [
        ("values", "Hounsfield units; anything else is refused"),
        ("orientation", _orientation(processor)),
        ("field of view", _field_of_view(processor)),
        ("spacing", _spacing(processor)),
        ("volume", f"{_by(processor.image_size)} voxels (depth, height, width)"),
        ("volume's HU window", f"{_range(processor.hu_window)} HU, {_levels(processor.volume_normalization)}"),
        ("volume's normalisation", f"minus {processor.volume_mean:g}, divided by {processor.volume_std:g}"),
    ]
    if processor.resample_spacing is not None:
        rows.insert(2, ("resampled first", f"to {_by(processor.resample_spacing)} mm, trilinear"))
    return rows + _slices(processor)


def _slices(processor: HSENetImageProcessor) -> list[tuple[str, str]]:
    if not processor.num_slices:
        return [("slices", "none: the model reads the volume alone")]
    chosen = {"uniform": "planes at equal distances", "slab_mean": "means of equal slabs"}[processor.slice_selection]
    window = f"{_range(processor.slice_hu_window)} HU" if processor.slice_hu_window else "no window"
    turned = f", turned by {processor.slice_rotation} degrees" if processor.slice_rotation else ""
    pictures = f", JPEG of quality {processor.slice_jpeg_quality}" if processor.slice_jpeg_quality else ""
    size = _by(processor.slice_size)
    cut = {"field_of_view": "the volume's field of view", "whole_plane": "the centre of the whole plane"}
    along = "depth" if processor.slice_axis == "depth" else "the shorter of depth and height"
    return [
        ("slices", f"{processor.num_slices} of {size} pixels along {along}: {chosen}{turned}{pictures}"),
        ("slices show", cut[processor.slice_fit]),
        ("slices' HU window", f"{window}, {_levels(processor.slice_normalization)}"),
        (
            "slices' normalisation",
            f"mean {_listed(processor.image_mean)}, standard deviation {_listed(processor.image_std)}",
        ),
    ]


def _orientation(processor: HSENetImageProcessor) -> str:
    if processor.orientation == "stored":
        return "as stored: third, first, second axis of the file, whichever way they run (the released weights' way)"
    return (
        "by the affine to S, P, L: depth from inferior to superior, height from anterior to posterior, width from the "
        "patient's right to the left"
    )


def _field_of_view(processor: HSENetImageProcessor) -> str:
    if processor.volume_fit == "nonzero_box":
        return "bounding box of what is above the window's lower end"
    if processor.spacing is not None:
        return "centred on the body, cut to the volume's size or padded with the window's lower end"
    return "the body's bounding box" if processor.crop_to_body else "the whole scan"


def _spacing(processor: HSENetImageProcessor) -> str:
    if processor.spacing is not None and processor.volume_fit != "nonzero_box":
        return f"{_by(processor.spacing)} mm (depth, height, width), whatever the scan's"
    how = "without antialiasing" if processor.volume_fit == "nonzero_box" else "antialiased"
    return f"not kept: the field of view is stretched to the volume's size, {how}; a voxel has no fixed millimetres"


def _levels(normalization: str) -> str:
    whose = {"window": "the window's ends", "min_max": "the scan's extremes within it"}
    whose |= {"slice_min_max": "each slice's extremes", "volume_min_max": "the scan's extremes"}
    return f"{whose[normalization]} become 0 and 1"


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _range(window: tuple[float, float]) -> str:
    return f"from {window[0]:g} to {window[1]:g}"


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what computes: code and weights."""
    paths = [*sorted(folder.glob("*_hsenet.py")), *sorted(folder.glob("*.safetensors"))]
    return {path.name: sha256_of(path) for path in paths}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
