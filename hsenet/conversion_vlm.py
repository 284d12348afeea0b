# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The released models that write: a language model, both 3D encoders, and the file with what stage 3 trained.

That file holds two packers and LoRA, no more. The encoders come from the stage-2 CLIP, in whose file the frozen
stage 1 lies, and the language model from its own makers. The result is one model with LoRA merged, or a base without
LoRA and the adapter in its folder `adapters`.
"""

import shutil
from pathlib import Path
from statistics import mode

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from configuration_hsenet import HSENetCLIPConfig, HSENetConfig
from hsenet.adapter_base import FILE as BASE
from hsenet.adapter_base import record_base
from hsenet.adapters import PEFT_PREFIX, adapter_layout, lora_config, merge_lora, save_adapter
from hsenet.cards import write_model_card
from hsenet.checkpoint_files import Checkpoint, read_checkpoint
from hsenet.checkpoint_names import VLM_ADAPTER
from hsenet.conversion import (
    load_tokenizer,
    released_image_processor,
    stage1_in_stage2,
    stage1_model,
    stage2_model,
)
from hsenet.conversion_output import Report, finished_folder, on_meta, plain_config, write_model
from hsenet.conversion_slices import BIOMEDCLIP_ID, read_slice_encoder
from hsenet.name_table import ConversionError, rename
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


LANGUAGE_MODEL_ID = "microsoft/Phi-4-mini-instruct"
IMAGE_TOKEN = "<image>"
# What the public training code adds to the tokenizer after its placeholder `<im_patch>`, whose id `<image>` takes.
UNUSED_TOKENS = ("<bx_start>", "<bx_end>", "[SEG]")


def convert_vlm(
    source: str | Path,
    output: str | Path,
    *,
    stage2: str | Path,
    stage1: str | Path | None = None,
    slice_encoder: str | Path | None = BIOMEDCLIP_ID,
    language_model: str | Path = LANGUAGE_MODEL_ID,
    adapter: str | None = None,
    lora_alpha: int = 32,
    packer_window_size: tuple[int, int, int] = (1, 4, 4),
    text_config: dict | None = None,
    num_slices: int = 32,
    dataset: str = "ct_rate",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """
    Args:
        source, output (`str`): the file with packers and LoRA, and the folder to write.
        stage2, stage1 (`str`):
            CLIP checkpoints, released or converted. Without `stage1` the global encoder is the frozen one in `stage2`.
        slice_encoder (`str`, *optional*):
            See [`convert_clip`]; a converted `stage2` has its own, or none.
        language_model (`str`): the causal language model that LoRA was trained on.
        adapter (`str`, *optional*):
            Keep LoRA and packers as adapter `OUTPUT/adapters/<adapter>`, and the language model as it was. By default
            LoRA is merged.
        lora_alpha (`int`): LoRA's output is multiplied by it and divided by the rank; the file does not say it.
        packer_window_size (`tuple[int, int, int]`): patches along depth, height, width that one token stands for.
        text_config, num_slices, dataset, dtype: see [`convert_clip`].

    Raises:
        [`ConversionError`]: if a source does not fit its layout; the message names the tensors.
    """
    report = Report("vlm")
    trained = read_checkpoint(source)
    stage1_clip, stage2_clip = _clips(stage1, stage2, slice_encoder, report, text_config, num_slices)
    text_model, tokenizer = read_language_model(language_model, report, dtype)
    slice_encoder_config = stage2_clip.config.slice_config
    config = HSENetConfig(
        vision_config=plain_config(stage1_clip.config.vision_config.to_dict()),
        local_vision_config=plain_config(stage2_clip.config.vision_config.to_dict()),
        slice_config=plain_config(slice_encoder_config.to_dict()) if slice_encoder_config is not None else None,
        text_config={**plain_config(text_model.config.to_dict()), "vocab_size": len(tokenizer)},
        packer_window_size=packer_window_size,
        packer_residual="projected_query",
        num_slices=stage2_clip.config.num_slices,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    tensors, peft_config = read_adapter(trained, config, lora_alpha, report)
    model = _assembled(config, stage1_clip, stage2_clip, text_model, tensors)
    image_processor = released_image_processor(stage2_clip.config, dataset)
    processor = HSENetProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        prompt_style="plain",
        plain_prompt_layout="adjacent",
    )
    with finished_folder(output) as folder:
        if adapter is None:
            merge_lora(model, tensors, lora_alpha / peft_config.r)
        else:
            save_adapter(tensors, peft_config, folder / "adapters" / adapter)
            report.notes.append(f"without LoRA, which is in adapters/{adapter}: see hsenet.adapters.load_adapters")
        write_model(model.to(dtype), processor, folder, report)
        if adapter is not None:
            record_base(model, folder / "adapters" / adapter)
            write_model_card(folder / "adapters" / adapter)
    return report


def convert_vlm_adapter(source: str | Path, output: str | Path, *, base: str | Path, lora_alpha: int = 32) -> Report:
    """
    Only the adapter, for a base that `convert_vlm` wrote: another task's, such as VQA beside reports.

    Args:
        source, output (`str`): the file with packers and LoRA, and the folder to write.
        base (`str`):
            Folder or Hub id of the base. Only its configuration is read, and in a folder what its other adapters have
            recorded of its weights.
        lora_alpha (`int`): see [`convert_vlm`].
    """
    report = Report("vlm adapter")
    tensors, peft_config = read_adapter(
        read_checkpoint(source), HSENetConfig.from_pretrained(base), lora_alpha, report
    )
    with finished_folder(output) as folder:
        save_adapter(tensors, peft_config, folder)
        if recorded := sorted(Path(base).glob(f"adapters/*/{BASE}")):
            shutil.copyfile(recorded[0], folder / BASE)
        report.write(folder)
        write_model_card(folder)
    return report


def read_adapter(
    checkpoint: Checkpoint, config: HSENetConfig, lora_alpha: int, report: Report
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """The tensors as PEFT names them on our model, complete, and the adapter's configuration."""
    ranks = [tensor.shape[0] for name, tensor in checkpoint.tensors.items() if ".lora_A." in name]
    if not ranks:
        raise ConversionError(
            f"Expected LoRA and two packers in {checkpoint.label}, found no tensor named *.lora_A.*."
        )
    model = on_meta(HSENetForConditionalGeneration, config)
    # By majority, so that one wrongly shaped tensor is named, not all others.
    peft_config = lora_config(model, r=mode(ranks), alpha=lora_alpha)
    expected = adapter_layout(model, peft_config)
    renaming = rename(checkpoint.tensors, VLM_ADAPTER, expected, f"file of stage 3 ({checkpoint.label})")
    report.add("packers and LoRA", checkpoint.label, renaming)
    return {name: tensor.float() for name, tensor in renaming.state.items()}, peft_config


def read_language_model(
    source: str | Path, report: Report, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The language model and its tokenizer with the tokens of the public training code. The embeddings have one row for
    each: those of the new tokens, and of the padding that Phi's have at their end, are the mean of all others, as they
    were when LoRA was trained.
    """
    tokenizer = load_tokenizer(source)
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]:
        raise ConversionError(f"The language model does not fit its files in {sorted(wrong)[:10]}: get it again.")
    words, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if rows < words:
        raise ConversionError(f"The tokenizer has {words} tokens, but the language model embeds {rows}.")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *UNUSED_TOKENS[:2]]})
    tokenizer.add_tokens(list(UNUSED_TOKENS[2:]))
    tokenizer.chat_template = None  # LoRA was trained on the plain prompt
    for embeddings in {model.get_input_embeddings(), model.get_output_embeddings()}:
        known = embeddings.weight.data[:words]
        new = known.float().mean(dim=0).to(known.dtype).expand(len(tokenizer) - words, -1)
        embeddings.weight = torch.nn.Parameter(torch.cat([known, new]), requires_grad=False)
    label = source if not Path(source).exists() else "a local folder"
    report.notes.append(
        f"language model from {label}: embeddings cut from {rows} to {words} rows, {len(tokenizer) - words} added"
    )
    return model, tokenizer


def _clips(
    stage1: str | Path | None,
    stage2: str | Path,
    slice_encoder: str | Path | None,
    report: Report,
    text_config: dict | None,
    num_slices: int,
) -> tuple[HSENetCLIPModel, HSENetCLIPModel]:
    """The models of stage 1 and 2, each from a released or a converted checkpoint."""
    checkpoint = read_checkpoint(stage2)
    in_stage2 = None
    if checkpoint.config.get("model_type") == HSENetCLIPConfig.model_type:
        stage2_clip = HSENetCLIPModel.from_pretrained(checkpoint.folder, dtype=torch.float32)
        report.notes.append(f"local encoder and slice encoder, if any, as they are from {checkpoint.label}")
    else:
        slices = read_slice_encoder(slice_encoder, report) if slice_encoder is not None else None
        stage2_clip = stage2_model(checkpoint, report, slices, text_config, num_slices)
        in_stage2 = stage1_in_stage2(checkpoint, report, text_config, keep=stage1 is None)
    if stage1 is None:
        if in_stage2 is None:
            raise ConversionError(f"There is no stage 1 in {checkpoint.label}: pass it as stage1 (--stage1).")
        return in_stage2, stage2_clip
    checkpoint = read_checkpoint(stage1)
    if checkpoint.config.get("model_type") == HSENetCLIPConfig.model_type:
        report.notes.append(f"global encoder as it is from {checkpoint.label}")
        return HSENetCLIPModel.from_pretrained(checkpoint.folder, dtype=torch.float32), stage2_clip
    return stage1_model(checkpoint, report, text_config), stage2_clip


def _assembled(
    config: HSENetConfig,
    stage1: HSENetCLIPModel,
    stage2: HSENetCLIPModel,
    text_model: PreTrainedModel,
    adapter: dict[str, torch.Tensor],
) -> HSENetForConditionalGeneration:
    parts = {
        "model.global_encoder.": stage1.vision_model.state_dict(),
        "model.local_encoder.": stage2.vision_model.state_dict(),
        "model.language_model.": text_model.base_model.state_dict(),
        "lm_head.": text_model.get_output_embeddings().state_dict(),
    }
    if stage2.slice_encoder is not None:
        parts["model.slice_encoder."] = stage2.slice_encoder.state_dict()
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    state |= {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in adapter.items() if ".lora_" not in name}
    model = on_meta(HSENetForConditionalGeneration, config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Greedy, and only the configuration's own end token ends an answer, as in the public evaluation: an instruct
    # model's generation settings are for its chat.
    tokens = {name: getattr(text_model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model.eval()
