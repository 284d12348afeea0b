# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""From the released CLIP weights of HSENet and M3D, BiomedCLIP and plain ViTs to folders that `AutoModel` loads.

Sources are folders, files or Hub ids, as `read_checkpoint` takes them. Each function writes a complete folder, or
nothing and an error that names the tensors at fault, and returns the report that it writes into the folder.
`conversion_vlm.py` does the same for the models that write.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ViTConfig

from configuration_hsenet import HSENetCLIPConfig, HSENetVisionConfig
from hsenet.checkpoint_files import Checkpoint, read_checkpoint
from hsenet.checkpoint_names import BIOMEDCLIP, STAGE1_CLIP, STAGE2_CLIP, TEACHER_PREFIX, VIT, VIT_CLASSIFIER
from hsenet.conversion_output import Report, finished_folder
from hsenet.fingerprint import store_fingerprint
from hsenet.name_table import ConversionError, NameTable, Renaming, rename
from modeling_hsenet import HSENetCLIPModel, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


BIOMEDCLIP_ID = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
# The released configurations' words for the 3D encoder, and ours.
VISION_SETTINGS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_channels": "num_channels",
    "hidden_size": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
# transformers' words for a ViT that are ours too.
VIT_SETTINGS = ("num_channels", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VIT_SETTINGS += ("hidden_act", "layer_norm_eps", "qkv_bias")
# Width, layers and heads of timm's ViTs.
TIMM_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
# Traces of where a configuration came from, which are not for another model's.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


def convert_clip(
    kind: Literal["stage1-clip", "stage2-clip", "m3d-clip"],
    source: str | Path,
    output: str | Path,
    *,
    slice_encoder: str | Path = BIOMEDCLIP_ID,
    teacher: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_config: dict | None = None,
    num_slices: int = 32,
    dataset: str = "ct_rate",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """
    The contrastive models.

    Args:
        kind (`str`): HSENet's stage 1 or 2, or M3D-CLIP, whose layout is stage 1's.
        source, output (`str`): what to convert, and the folder to write.
        slice_encoder (`str`): for stage 2, whose file lacks it; see [`read_slice_encoder`].
        teacher (`str`, *optional*): folder for the frozen stage 1 in a stage-2 file; without it it is dropped.
        tokenizer (`str`, *optional*): the text encoder's, if it is not beside the source.
        text_config (`dict`, *optional*): of the text encoder, if it is not bert-base-uncased.
        num_slices (`int`): slices a volume.
        dataset (`str`): whose preparation the processor repeats; see [`HSENetImageProcessor.released`].
        dtype (`torch.dtype`): of the saved weights.

    Raises:
        [`ConversionError`]: if the source does not fit its layout; the message names the tensors.
    """
    checkpoint = read_checkpoint(source)
    report = Report(kind)
    if kind == "m3d-clip":
        report.notes.append(
            "scans are prepared as for HSENet's stage 1; how M3D prepared its own is not in its weights"
        )
    slices = read_slice_encoder(slice_encoder, report) if kind == "stage2-clip" else None
    models = {output: clip_model(checkpoint, report, slices, text_config=text_config, num_slices=num_slices)}
    if kind == "stage2-clip":
        teacher_model = stage1_in_stage2(checkpoint, report, text_config=text_config, keep=teacher is not None)
        if teacher is not None:
            models[teacher] = teacher_model
    text_tokenizer = _text_tokenizer(checkpoint, tokenizer, report)
    with ExitStack() as folders:
        for target, model in models.items():
            folder = folders.enter_context(finished_folder(target))
            processor = _clip_processor(model, text_tokenizer, dataset)
            write_model(model.to(dtype), processor, folder, report)
    return report


def convert_slice_encoder(source: str | Path, output: str | Path, *, dtype: torch.dtype = torch.float32) -> Report:
    """BiomedCLIP's 2D trunk in open_clip's layout, or a plain ViT of transformers, as slice encoder."""
    report = Report("slice encoder")
    model = read_slice_encoder(source, report)
    with finished_folder(output) as folder:
        return write_model(model.to(dtype), None, folder, report)


def write_model(
    model: PreTrainedModel, processor: HSENetProcessor | HSENetImageProcessor | None, folder: Path, report: Report
) -> Report:
    """Saves model, processor and report, and the fingerprint of what loads from there."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    report.write(folder, fingerprint=store_fingerprint(folder)["hash"])
    return report


def clip_model(
    checkpoint: Checkpoint,
    report: Report,
    slice_encoder: HSENetVisionModel | None = None,
    *,
    text_config: dict | None = None,
    num_slices: int = 32,
) -> HSENetCLIPModel:
    """
    The model in a stage-1 file or, with a slice encoder, in a stage-2 file, of which the frozen stage 1 is left out.

    It holds the checkpoint's tensors but no buffers yet: save it, and load it from there.
    """
    settings = _clip_settings(checkpoint, text_config)
    if slice_encoder is None:
        model = _on_meta(HSENetCLIPModel, HSENetCLIPConfig(**settings))
        return fill(model, checkpoint.tensors, STAGE1_CLIP, "CLIP", checkpoint.label, report)
    settings["vision_config"]["scorer_residual"] = "projected_query"
    slices = {"slice_config": plain_config(slice_encoder.config.to_dict()), "num_slices": num_slices}
    model = _on_meta(HSENetCLIPModel, HSENetCLIPConfig(guidance="slices", **slices, **settings))
    model.slice_encoder = None  # while the rest is filled, all of which is in the file
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(TEACHER_PREFIX)}
    fill(model, tensors, STAGE2_CLIP, "CLIP", checkpoint.label, report)
    model.slice_encoder = slice_encoder
    return model


def stage1_in_stage2(
    checkpoint: Checkpoint, report: Report, *, text_config: dict | None = None, keep: bool
) -> HSENetCLIPModel | None:
    """The frozen stage 1 in a stage-2 file, checked as completely whether it is kept or listed as dropped."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(TEACHER_PREFIX)}
    if not tensors:
        if keep:
            raise ConversionError(f"Expected the frozen stage 1 in {checkpoint.label}: no {TEACHER_PREFIX}* is there.")
        return None
    model = _on_meta(HSENetCLIPModel, HSENetCLIPConfig(**_clip_settings(checkpoint, text_config)))
    table, found = STAGE1_CLIP.under(TEACHER_PREFIX, ""), Report("")
    fill(model, tensors, table, "frozen stage 1", checkpoint.label, found)
    if keep:
        report.parts += found.parts
    else:
        reason = "the frozen stage 1, which only training needs"
        report.add("frozen stage 1", checkpoint.label, Renaming(dropped=dict.fromkeys(tensors, reason)))
    return model


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
    model = _on_meta(HSENetVisionModel, config)
    return fill(model, checkpoint.tensors, table, "slice encoder", checkpoint.label, report)


def fill(
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    table: NameTable,
    what: str,
    label: str,
    report: Report,
) -> PreTrainedModel:
    """Puts all tensors, renamed, into all places of a model on the meta device, without copies where possible."""
    renaming = rename(tensors, table, model.state_dict(), f"{what} ({label})")
    report.add(what, label, renaming)
    model.load_state_dict(renaming.state, assign=True)
    return model.eval()


def plain_config(config: dict) -> dict:
    """A configuration as a part of another's."""
    return {name: value for name, value in config.items() if name not in ORIGIN}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        `ValueError`: if there is none; `AutoTokenizer` gives an empty one for a folder with a configuration alone.
    """
    folder = Path(source)
    only_words = (folder / "vocab.txt").exists() and not (folder / "tokenizer.json").exists()
    tokenizer = (BertTokenizer if only_words else AutoTokenizer).from_pretrained(source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"Expected a tokenizer in {source}, got one without words: its files are missing.")
    return tokenizer


def _on_meta(model_class: type, config: HSENetCLIPConfig | HSENetVisionConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def _clip_settings(checkpoint: Checkpoint, text_config: dict | None) -> dict:
    vision = {ours: checkpoint.config[key] for key, ours in VISION_SETTINGS.items() if key in checkpoint.config}
    if text_config is None and (folder := _text_folder(checkpoint)) is not None:
        text_config = json.loads((folder / "config.json").read_text())
    return {
        "vision_config": vision,
        "text_config": {"model_type": "bert", **plain_config(text_config or {})},  # bert-base-uncased by default
        "projection_dim": vision.get("hidden_size", HSENetVisionConfig.hidden_size),
    }


def _text_folder(checkpoint: Checkpoint) -> Path | None:
    """Where the source says that its text encoder came from, if that is on this machine."""
    folder = Path(checkpoint.config.get("language_model_name_or_path") or "")
    return folder if folder.is_absolute() and (folder / "config.json").exists() else None


def _text_tokenizer(
    checkpoint: Checkpoint, tokenizer: str | Path | None, report: Report
) -> PreTrainedTokenizerBase | None:
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    for folder in (checkpoint.folder, _text_folder(checkpoint)):
        if folder is not None and any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
            return load_tokenizer(folder)
    report.notes.append("no tokenizer beside the source: only the image processor was saved; see --tokenizer")
    return None


def _clip_processor(
    model: HSENetCLIPModel, tokenizer: PreTrainedTokenizerBase | None, dataset: str
) -> HSENetProcessor | HSENetImageProcessor:
    image_processor = released_image_processor(model.config, dataset)
    if tokenizer is None:
        return image_processor
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"Expected a tokenizer of at most {model.config.text_config.vocab_size} words, as many as the text "
            f"encoder embeds, got {len(tokenizer)}: it is another model's."
        )
    return HSENetProcessor(image_processor, tokenizer)


def released_image_processor(config: HSENetCLIPConfig, dataset: str) -> HSENetImageProcessor:
    """What the released weights saw, at this model's sizes."""
    sizes = {"image_size": config.vision_config.image_size, "num_slices": 0}
    if config.slice_config is not None:
        sizes |= {"num_slices": config.num_slices, "slice_size": config.slice_config.image_size[1:]}
    return HSENetImageProcessor.released(dataset, **sizes)


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
