# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What stage 3 trains, as PEFT adapters: LoRA on the language model, and the packers in full.

Each adapter brings its own packers, so that one base serves several tasks and is switched without reloading:

    model = AutoModel.from_pretrained("hsenet-vlm")
    model = load_adapters(model, {"reports": "hsenet-vlm/adapters/reports", "vqa": "hsenet-vlm/adapters/vqa"})
    model.set_adapter("vqa")
    merged = merge_adapter(model, "vqa")  # a plain model without PEFT
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hsenet.adapter_base import PACKERS, check_base
from hsenet.checkpoint_files import locate
from modeling_hsenet import HSENetForConditionalGeneration


ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of PEFT's names, before the model's own


def lora_config(
    model: HSENetForConditionalGeneration,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = (),
) -> LoraConfig:
    """LoRA on every linear layer of the language model, as the paper, or on some; the packers train in full.

    Args:
        model ([`HSENetForConditionalGeneration`]): whose layers it names; may be on the meta device.
        r (`int`): rank.
        alpha (`int`): LoRA's output is multiplied by `alpha / r`.
        dropout (`float`): on LoRA's input while training.
        target_modules: last names of the layers, such as "qkv_proj"; empty: all.

    Raises:
        `ValueError`: the language model has no linear layer of such a name.
    """
    backbone = "model.language_model"
    linear = [
        f"{backbone}.{name}"
        for name, module in model.get_submodule(backbone).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if target_modules:
        names = {name.rpartition(".")[2] for name in linear}
        if unknown := sorted(set(target_modules) - names):
            raise ValueError(f"No layers named {', '.join(unknown)}: expected some of {', '.join(sorted(names))}.")
        linear = [name for name in linear if name.rpartition(".")[2] in target_modules]
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear, modules_to_save=[PACKERS])


def adapter_layout(model: HSENetForConditionalGeneration, config: LoraConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of the adapter's tensors on disk; `model`, on the meta device, is changed."""
    with torch.device("meta"):
        return get_peft_model_state_dict(get_peft_model(model, config))


def save_adapter(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: str | Path) -> None:
    """Writes tensors, named as `adapter_layout` does, so that PEFT and transformers can load them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapters(
    model: HSENetForConditionalGeneration, folders: dict[str, str | Path], *, revision: str | None = None
) -> PeftModel:
    """
    Args:
        model ([`HSENetForConditionalGeneration`]): the base, as `from_pretrained` gives it.
        folders (`dict[str, str]`):
            Name of each adapter, and its folder or Hub id (`owner/name` or `owner/name/folder`); the first is active.
        revision (`str`, *optional*): of those on the Hub: a commit, best.

    Returns:
        `PeftModel`: switch with `set_adapter(name)`, go back to the base with `disable_adapter()`.

    Raises:
        `ValueError`:
            If an adapter doesn't fit the base or isn't complete, naming the tensors, or if it is known to have been
            trained on other weights.
    """
    peft_model, model_class, config = None, type(model), model.config
    for name, source in folders.items():
        folder = locate(source, (ADAPTER_WEIGHTS,), revision)[0]
        with torch.device("meta"):
            _check_complete(name, folder, model_class(config))
        check_base(peft_model or model, folder, name)
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            peft_model.load_adapter(folder, adapter_name=name)
    if peft_model is None:
        raise ValueError("Expected at least one adapter, got none.")
    return peft_model.eval()


def merge_adapter(model: PeftModel, name: str) -> HSENetForConditionalGeneration:
    """The base with one adapter in its weights and its packers in place; the others are gone."""
    model.set_adapter(name)
    return model.merge_and_unload(adapter_names=[name])


def merge_lora(model: HSENetForConditionalGeneration, adapter: dict[str, torch.Tensor], scale: float) -> None:
    """Adds `scale * B A` to each weight, in float32, one by one; for a model without buffers, too large for PEFT.

    Args:
        model ([`HSENetForConditionalGeneration`]): changed in place.
        adapter (`dict[str, torch.Tensor]`): as `save_adapter` takes it; the packers in it are left alone.
        scale (`float`): LoRA's alpha divided by its rank.
    """
    for name, lora_a in adapter.items():
        if name.endswith(".lora_A.weight"):
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            weight = model.get_parameter(name.removeprefix(PEFT_PREFIX).replace(".lora_A.", "."))
            weight.data = (weight.data.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)


def _check_complete(name: str, folder: Path, base: HSENetForConditionalGeneration) -> None:
    """PEFT only warns about LoRA that it did not find. `base` is changed: a model on the meta device."""
    config = LoraConfig.from_pretrained(folder)
    if config.modules_to_save != [PACKERS]:
        raise ValueError(
            f"Expected an adapter with its own packers (modules_to_save: ['{PACKERS}']), got "
            f"{config.modules_to_save}: this one was not made by HSENet's stage 3."
        )
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_layout(base, config).items()}
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        got = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    if wrong := sorted(key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)):
        shown = "; ".join(f"{key}: expected {expected.get(key)}, got {got.get(key)}" for key in wrong[:10])
        raise ValueError(f"Adapter {name!r} does not fit this base in {len(wrong)} tensor(s): {shown}.")
