"""The language model that stage 3 starts from: in which precision its frozen weights are held."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsenet.quantization import quantization_config


@dataclass
class LanguageModelArguments:
    language_model: str = field(default="microsoft/Phi-4-mini-instruct")
    language_model_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the frozen weights; what trains stays float32."}
    )
    quantization: Literal["none", "8bit", "4bit"] = field(
        default="none", metadata={"help": "Of the frozen weights, with bitsandbytes (the paper: 8bit)."}
    )


def load_language_model(arguments: LanguageModelArguments, device: torch.device) -> PreTrainedModel:
    """
    Args:
        device: where quantised weights are made; others are loaded on the CPU.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    dtype = getattr(torch, arguments.language_model_dtype)
    settings = {}
    if arguments.quantization != "none":
        settings = {
            "quantization_config": quantization_config(arguments.quantization, dtype),
            "device_map": {"": device},
        }
    return AutoModelForCausalLM.from_pretrained(arguments.language_model, dtype=dtype, **settings)
