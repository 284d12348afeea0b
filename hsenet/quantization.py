# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Weights on 8 or 4 bits, with bitsandbytes: those of the language model, which are nearly all of them."""

import importlib.util
from typing import Literal

import torch
from transformers import BitsAndBytesConfig


# Of a model that writes: what keeps its precision. Names as transformers matches them, from the start.
NOT_QUANTIZED = [
    "model.global_encoder",
    "model.local_encoder",
    "model.slice_encoder",
    "model.multi_modal_projector",
    "lm_head",
]


def quantization_config(
    bits: Literal["8bit", "4bit"], dtype: str | torch.dtype | None = None, skip: list[str] | None = None
) -> BitsAndBytesConfig:
    """
    Args:
        bits: 8 bits as LLM.int8, or 4 as NF4.
        dtype: in which products of 4-bit weights are computed; default: that of what comes in.
        skip (`list[str]`, *optional*): modules that stay as they are; default: the output head.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f'{bits} weights need bitsandbytes, which is not installed: pip install "hsenet[quantization]".'
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip
    )
