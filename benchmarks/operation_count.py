"""Floating-point operations of training steps, counted from the sizes: a multiplication with its addition is two.

A backward pass costs twice the forward pass where weights train, once where only what comes before them trains (a
frozen language model with LoRA), and nothing for a frozen encoder. Elementwise work is not counted.
"""

from math import prod

from transformers import PreTrainedConfig

from configuration_hsenet import HSENetConfig, HSENetVisionConfig


def vision_encoder(config: HSENetVisionConfig, num_slices: int = 0) -> float:
    """One forward pass of a ViT over a volume or a slice; with the scorer, if it has one, over so many slices."""
    patches, width = config.num_patches, config.hidden_size
    embedding = 2 * patches * config.num_channels * prod(config.patch_size) * width
    total = embedding + config.num_hidden_layers * _layer(patches + 1, width, config.intermediate_size)
    if config.slice_hidden_size is not None:
        total += 2 * (2 * patches * width**2 + 2 * num_slices * config.slice_hidden_size * width)
        total += 4 * patches * num_slices * width
    return total


def text_encoder(config: PreTrainedConfig, tokens: int) -> float:
    return config.num_hidden_layers * _layer(tokens, config.hidden_size, config.intermediate_size)


def packers(config: HSENetConfig) -> float:
    """One forward pass of all spatial packers, as they are: every patch becomes a key and a value."""
    total = 0.0
    for encoder in (config.vision_config, config.local_vision_config):
        patches, width, out = encoder.num_patches, encoder.hidden_size, config.text_config.hidden_size
        windows = patches // prod(config.packer_window_size)
        total += 2 * width**2 * (2 * patches + 2 * windows) + 4 * patches * width
        total += 2 * windows * (width * out + out**2)
    return total


def language_model(config: PreTrainedConfig, tokens: int, answer_tokens: int) -> float:
    """One forward pass over a row, with logits for its answer only. `config` is that of a Phi-3."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    qkv = width * (width + 2 * config.num_key_value_heads * head)
    weights = qkv + width**2 + 3 * width * config.intermediate_size
    attention = 4 * tokens**2 * width
    layers = config.num_hidden_layers * (2 * tokens * weights + attention)
    return layers + 2 * answer_tokens * width * config.vocab_size


def _layer(tokens: int, width: int, intermediate: int) -> float:
    return 2 * tokens * (4 * width**2 + 2 * width * intermediate) + 4 * tokens**2 * width
