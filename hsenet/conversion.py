# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""From the released CLIP weights of HSENet and M3D to folders that `AutoModel` loads.

Sources are folders, files or Hub ids, as `read_checkpoint` takes them. Each function writes a complete folder, or
nothing and an error that names the tensors at fault, and returns the report that it writes into the folder.
`conversion_slices.py` does the same for the 2D encoders, `conversion_vlm.py` for the models that write.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from configuration_hsenet import HSENetCLIPConfig, HSENetVisionConfig
from hsenet.checkpoint_files import Checkpoint, read_checkpoint
from hsenet.checkpoint_names import STAGE1_CLIP, STAGE2_CLIP, TEACHER_PREFIX
from hsenet.conversion_output import Report, fill, finished_folder, on_meta, plain_config, write_model
from hsenet.conversion_slices import BIOMEDCLIP_ID, read_slice_encoder
from hsenet.name_table import ConversionError, Renaming
from modeling_hsenet import HSENetCLIPModel, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


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


def convert_clip(
    kind: Literal["stage1-clip", "stage2-clip", "m3d-clip"],
    source: str | Path,
    output: str | Path,
    *,
    slice_encoder: str | Path | None = BIOMEDCLIP_ID,
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
        slice_encoder (`str`, *optional*):
            For stage 2, whose file lacks it; see [`read_slice_encoder`]. `None`: the model then has none, and takes
            cached `slice_features` instead of slices.
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
    if kind == "stage2-clip":
        slices = read_slice_encoder(slice_encoder, report) if slice_encoder is not None else None
        models = {output: stage2_model(checkpoint, report, slices, text_config, num_slices)}
        teacher_model = stage1_in_stage2(checkpoint, report, text_config, keep=teacher is not None)
        if teacher is not None:
            models[teacher] = teacher_model
    else:
        models = {output: stage1_model(checkpoint, report, text_config)}
    text_tokenizer = _text_tokenizer(checkpoint, tokenizer, report)
    with ExitStack() as folders:
        for target, model in models.items():
            folder = folders.enter_context(finished_folder(target))
            processor = _clip_processor(model, text_tokenizer, dataset)
            write_model(model.to(dtype), processor, folder, report)
    return report


def stage1_model(checkpoint: Checkpoint, report: Report, text_config: dict | None = None) -> HSENetCLIPModel:
    """
    The model in a stage-1 file.

    It holds the checkpoint's tensors but no buffers yet: save it, and load it from there.
    """
    model = on_meta(HSENetCLIPModel, HSENetCLIPConfig(**_clip_settings(checkpoint, text_config)))
    return fill(model, checkpoint.tensors, STAGE1_CLIP, "CLIP", checkpoint.label, report)


def stage2_model(
    checkpoint: Checkpoint,
    report: Report,
    slice_encoder: HSENetVisionModel | None = None,
    text_config: dict | None = None,
    num_slices: int = 32,
) -> HSENetCLIPModel:
    """As `stage1_model`, from a stage-2 file, of which the frozen stage 1 is left out; see [`convert_clip`]."""
    settings = _clip_settings(checkpoint, text_config)
    settings["vision_config"] |= {"slice_hidden_size": _slice_width(checkpoint), "scorer_residual": "projected_query"}
    if slice_encoder is not None:
        settings["slice_config"] = plain_config(slice_encoder.config.to_dict())
    config = HSENetCLIPConfig(guidance="slices", num_slices=num_slices, **settings)
    model = on_meta(HSENetCLIPModel, config)
    model.slice_encoder = None  # while the rest is filled, all of which is in the file
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(TEACHER_PREFIX)}
    fill(model, tensors, STAGE2_CLIP, "CLIP", checkpoint.label, report)
    model.slice_encoder = slice_encoder
    if slice_encoder is None:
        shape = f"(volumes, {num_slices}, {config.vision_config.slice_hidden_size})"
        report.notes.append(f"no 2D encoder: the model takes cached slice_features {shape} instead of slices")
    return model


def stage1_in_stage2(
    checkpoint: Checkpoint, report: Report, text_config: dict | None = None, *, keep: bool
) -> HSENetCLIPModel | None:
    """The frozen stage 1 in a stage-2 file, checked as completely whether it is kept or listed as dropped."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(TEACHER_PREFIX)}
    if not tensors:
        if keep:
            raise ConversionError(f"Expected the frozen stage 1 in {checkpoint.label}: no {TEACHER_PREFIX}* is there.")
        return None
    model = on_meta(HSENetCLIPModel, HSENetCLIPConfig(**_clip_settings(checkpoint, text_config)))
    table, found = STAGE1_CLIP.under(TEACHER_PREFIX, ""), Report("")
    fill(model, tensors, table, "frozen stage 1", checkpoint.label, found)
    if keep:
        report.parts += found.parts
    else:
        reason = "the frozen stage 1, which only training needs"
        report.add("frozen stage 1", checkpoint.label, Renaming(dropped=dict.fromkeys(tensors, reason)))
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        `ValueError`: if there is none; `AutoTokenizer` gives an empty one for a folder with a configuration alone.
    """
    folder = Path(source)
    only_words = (folder / "vocab.txt").exists() and not (folder / "tokenizer.json").exists()
    # Told not to trust: otherwise a folder whose configuration names code, such as M3D-CLIP's, makes it ask to run it.
    tokenizer = (BertTokenizer if only_words else AutoTokenizer).from_pretrained(source, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"Expected a tokenizer in {source}, got one without words: its files are missing.")
    return tokenizer


def _clip_settings(checkpoint: Checkpoint, text_config: dict | None) -> dict:
    vision = {ours: checkpoint.config[key] for key, ours in VISION_SETTINGS.items() if key in checkpoint.config}
    if text_config is None and (folder := _text_folder(checkpoint)) is not None:
        text_config = json.loads((folder / "config.json").read_text())
    return {
        "vision_config": vision,
        "text_config": {"model_type": "bert", **plain_config(text_config or {})},  # bert-base-uncased by default
        "projection_dim": vision.get("hidden_size", HSENetVisionConfig.hidden_size),
    }


def _slice_width(checkpoint: Checkpoint) -> int:
    """Of the slice features that the scorer reads; a tensor that does not fit is named when all are renamed."""
    keys = checkpoint.tensors.get("vision_encoder.slice_guided_attention.Wk.weight")
    if keys is not None and keys.ndim == 2:
        return keys.shape[1]
    return checkpoint.config.get("hidden_size", HSENetVisionConfig.hidden_size)


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
