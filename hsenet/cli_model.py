# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What the commands with a model that writes share: how it is loaded."""

import argparse
from typing import Any

import torch
from transformers import PreTrainedModel

from hsenet.cli_scan import add_model_options
from hsenet.encoded_scan import load_generation_model
from hsenet.quantization import NOT_QUANTIZED, quantization_config
from hsenet_command import UsageError
from processing_hsenet import HSENetProcessor


def add_generation_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    add_model_options(model)
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: as stored)")
    model.add_argument(
        "--load_in",
        choices=("8bit", "4bit"),
        help="the language model's weights, with bitsandbytes (default: as stored)",
    )
    model.add_argument(
        "--adapter", metavar="DIR", help="LoRA and packers of `hsenet convert vlm --adapter`, or Hub id"
    )
    model.add_argument(
        "--trust_remote_code", action="store_true", help="run the model's own code instead of the installed package's"
    )


def load_as_chosen(
    source: str, device: torch.device, *, dtype: str | None, load_in: str | None, adapter: str | None, **options: Any
) -> tuple[PreTrainedModel, HSENetProcessor]:
    """The model without its adapter, which [`with_adapter`] merges."""
    if adapter and load_in:
        raise UsageError("--adapter is merged into the weights, which --load_in would have rounded before: choose one")
    quantized = {"quantization_config": quantization_config(load_in, dtype, NOT_QUANTIZED)} if load_in else {}
    return load_generation_model(source, device=device, dtype=dtype, **options, **quantized)


def with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from hsenet.adapters import load_adapters, merge_adapter  # needs PEFT

    return merge_adapter(load_adapters(model, {"adapter": adapter}), "adapter").eval()
