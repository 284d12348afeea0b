# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The 2D encoder of the slices, from open_clip's BiomedCLIP or a ViT of transformers."""

import json
import re
from pathlib import Path

import torch
from transformers import ViTConfig

from configuration_hsenet import HSENetVisionConfig
from hsenet.checkpoint_files import read_checkpoint
from hsenet.checkpoint_names import BIOMEDCLIP, VIT, VIT_CLASSIFIER
from hsenet.conversion_output import Report, fill, finished_folder, on_meta, write_model
from hsenet.name_table import ConversionError
from modeling_hsenet import HSENetVisionModel


BIOMEDCLIP_ID = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
# transformers' words for a ViT that are ours too.
VIT_SETTINGS = ("num_channels", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VIT_SETTINGS += ("hidden_act", "layer_norm_eps", "qkv_bias")
# Width, layers and heads of timm's ViTs.
TIMM_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def convert_slice_encoder(source: str | Path, output: str | Path, *, dtype: torch.dtype = torch.float32) -> Report:
    """BiomedCLIP's 2D trunk in open_clip's layout, or a plain ViT of transformers, as slice encoder."""
    report = Report("slice encoder")
    model = read_slice_encoder(source, report)
    with finished_folder(output) as folder:
        return write_model(model.to(dtype), None, folder, report)


def read_slice_encoder(source: str | Path, report: Report) -> HSENetVisionModel:
    """
    The 2D encoder of the slices: a folder that `convert_slice_encoder` or training wrote, open_clip's BiomedCLIP, or a
    ViT that transformers saved.
    """
    checkpoint = read_checkpoint(source)
    model_type = checkpoint.config.get("model_type")
    if model_type == "hsenet_vision":
        report.notes.append(f"slice encoder as it is from {checkpoint.label}")
        return HSENetVisionModel.from_pretrained(checkpoint.folder, dtype=torch.float32)
    if model_type == "vit":
        prefixed = any(name.startswith("vit.") for name in checkpoint.tensors)
        table, config = VIT_CLASSIFIER if prefixed else VIT, _vit_config(checkpoint.config)
    else:
        table, config = BIOMEDCLIP, _timm_config(checkpoint.folder)
    model = on_meta(HSENetVisionModel, config)
    return fill(model, checkpoint.tensors, table, "slice encoder", checkpoint.label, report)


def _vit_config(config: dict) -> HSENetVisionConfig:
    vit = ViTConfig(**config)  # files may leave out what is transformers' default
    (height, width), (patch_height, patch_width) = _pair(vit.image_size), _pair(vit.patch_size)
    return HSENetVisionConfig(
        image_size=(1, height, width),
        patch_size=(1, patch_height, patch_width),
        **{name: getattr(vit, name) for name in VIT_SETTINGS},
    )


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _timm_config(folder: Path) -> HSENetVisionConfig:
    """By the name that open_clip's configuration gives to the trunk; BiomedCLIP's if there is none."""
    file, name = folder / "open_clip_config.json", "vit_base_patch16_224"
    if file.exists():
        name = json.loads(file.read_text())["model_cfg"]["vision_cfg"].get("timm_model_name", "none of timm's")
    match = re.fullmatch(rf"vit_({'|'.join(TIMM_SIZES)})_patch(\d+)_(\d+)", name)
    if match is None:
        raise ConversionError(f"Expected a trunk like vit_base_patch16_224 in {file.name}, got {name!r}.")
    hidden_size, layers, heads = TIMM_SIZES[match[1]]
    return HSENetVisionConfig(
        image_size=(1, int(match[3]), int(match[3])),
        patch_size=(1, int(match[2]), int(match[2])),
        num_channels=3,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        qkv_bias=True,
        layer_norm_eps=1e-6,
    )
