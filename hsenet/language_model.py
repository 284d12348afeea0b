"""The language model that stage 3 starts from: in which precision its frozen weights are held."""

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


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
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                'quantization needs bitsandbytes: `pip install -e ".[quantization]"`, or leave it "none".'
            )
        settings = {"quantization_config": _quantization(arguments.quantization, dtype), "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(arguments.language_model, dtype=dtype, **settings)


def _quantization(bits: Literal["8bit", "4bit"], dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
