# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Which base an adapter was trained on: noted beside the adapter, and compared before it is put on a model.

An adapter fits every model of the same sizes, also the one that it is merged into, where it would count twice. Of each
tensor of the base up to 4,096 numbers are hashed, rounded to bfloat16 and to float16, so that a base is the same
whichever precision it is loaded in. Merged LoRA or another training changes many of them. The packers are left out:
each adapter brings its own.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn


FILE = "base.json"
PACKERS = "multi_modal_projector"
NUMBERS = 4096
ROUNDED_TO = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def record_base(model: nn.Module, folder: str | Path) -> None:
    """
    Args:
        model: the base, or a `PeftModel` on it before LoRA is merged.
        folder: of the adapter.
    """
    digests = {name: _digest(model, dtype) for name, dtype in ROUNDED_TO.items()}
    (Path(folder) / FILE).write_text(json.dumps(digests, indent=2) + "\n")


def check_base(model: nn.Module, folder: str | Path, name: str) -> None:
    """
    Nothing is known, and nothing refused, of an adapter without a record, and of a base that is quantised or not in
    memory.

    Raises:
        `ValueError`: the adapter was trained on another base.
    """
    file = Path(folder) / FILE
    if not file.exists() or getattr(model, "is_quantized", False) or any(p.is_meta for p in model.parameters()):
        return
    recorded = json.loads(file.read_text())
    if all(recorded[rounding] != _digest(model, dtype) for rounding, dtype in ROUNDED_TO.items()):
        raise ValueError(
            f"Adapter {name!r} was trained on other weights than this model's. Expected its base, without LoRA; a "
            "model that it is merged into, such as stage 3 leaves beside its adapter, has it already."
        )


def _digest(model: nn.Module, dtype: torch.dtype) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model)):
        numbers = tensor.detach().reshape(-1)
        numbers = numbers[:: max(1, len(numbers) // NUMBERS)].to(dtype).cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(numbers.view(torch.uint8).numpy())
    return sha.hexdigest()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, tensor in plain.state_dict().items():
        if "lora_" not in name and PACKERS not in name:
            yield name.replace(".base_layer.", "."), tensor
