# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Configurations of HSENet (arXiv 2506.09634). The defaults are the paper's sizes.

`HSENetVisionConfig` describes one ViT (3D or 2D), `HSENetCLIPConfig` the contrastive models of stages 1 and 2,
`HSENetConfig` the model that writes reports and answers questions. Sizes are always in the order depth, height, width.
"""

from copy import deepcopy
from math import prod
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, BertConfig, Phi3Config, PreTrainedConfig


@strict
class HSENetVisionConfig(PreTrainedConfig):
    r"""
    One vision transformer over volumes (paper section 3.1) or, with `image_size=(1, 224, 224)`, over 2D slices.

    Args:
        image_size (`tuple[int, int, int]`): voxels of the input along depth, height, width.
        patch_size (`tuple[int, int, int]`): voxels of one patch; must divide `image_size`.
        num_channels (`int`): 1 for HU volumes, 3 for slices shown as pictures.
        qkv_bias (`bool`): whether the query, key and value projections have a bias.
        slice_hidden_size (`int`, *optional*):
            Width of the slice features that weigh the patches. `None` (global encoder): there is no scorer; a number
            (2E3 encoder, paper section 3.2): a slice-guided scorer stands between patch embedding and transformer.
            In a contrastive model guided by text it is the width of the text encoder.
        scorer_dropout (`float`): dropout on the scorer's attention weights and output while training.
        scorer_residual (`"projected_query"` or `"query"`):
            What the scorer adds to its attention's output before the LayerNorm: the query after its projection, or
            the patch itself, before it. The released weights need the first. It is also the default: the paper's
            results were reached with it, and models saved before there was a choice load unchanged.
        patch_dropout (`float`):
            Share of the patches that a volume loses, at random, in each forward pass while training: half of them
            halves the cost and hinders overfitting (FLIP, arXiv 2212.00794). The paper's 0 by default.
    """

    model_type = "hsenet_vision"
    _auto_class = "AutoConfig"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] = (32, 256, 256)
    patch_size: list[int] | tuple[int, ...] = (4, 16, 16)
    num_channels: int = 1
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    slice_hidden_size: int | None = None
    scorer_dropout: float = 0.1
    scorer_residual: Literal["projected_query", "query"] = "projected_query"
    patch_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.image_size = _three_sizes("image_size", self.image_size)
        self.patch_size = _three_sizes("patch_size", self.patch_size)
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} should be divisible by patch_size {self.patch_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} should be divisible by num_attention_heads"
                f" {self.num_attention_heads}."
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout should be at least 0 and below 1, got {self.patch_dropout}.")
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Patches along depth, height, width: (8, 16, 16) by default."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        return prod(self.grid_size)


@strict
class HSENetCLIPConfig(PreTrainedConfig):
    r"""
    The contrastive volume-report models.

    Args:
        guidance (`"none"`, `"slices"`, `"text"` or `"text_cls"`):
            What scores the patches: `"none"` is stage 1 (global encoder), `"slices"` is stage 2 (2E3 encoder). For the
            ablation of paper table 1b, `"text"` takes all tokens of the report, `"text_cls"` its CLS token; the
            embedding of a volume then depends on the report beside it.
        vision_config (`HSENetVisionConfig` or `dict`, *optional*): the 3D encoder.
        text_config (`PreTrainedConfig` or `dict`, *optional*): a BERT-like text encoder; bert-base sizes by default.
        slice_config (`HSENetVisionConfig` or `dict`, *optional*):
            The frozen 2D encoder of the slices, only with `guidance="slices"`. By default BiomedCLIP's ViT-B/16 sizes,
            but none if `vision_config` has its own `slice_hidden_size`: the model then takes only cached slice
            features of that width.
        num_slices (`int`): axial slices a volume.
        projection_dim (`int`): width of the shared embedding space.
        logit_scale_init_value (`float`): start of the log temperature; `exp` is taken in use.
    """

    model_type = "hsenet_clip"
    _auto_class = "AutoConfig"
    sub_configs = {"vision_config": HSENetVisionConfig, "text_config": AutoConfig, "slice_config": HSENetVisionConfig}

    guidance: Literal["none", "slices", "text", "text_cls"] = "none"
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    slice_config: dict | PreTrainedConfig | None = None
    num_slices: int = 32
    projection_dim: int = 768
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = _vision_config(self.vision_config)
        self.text_config = _text_config(self.text_config, default=BertConfig)
        if self.guidance == "slices":
            self.slice_config = _slice_config(self.slice_config, self.vision_config)
        else:
            self._check_no_slices()
            if self.guidance != "none":
                self.vision_config.slice_hidden_size = self.text_config.hidden_size
        super().__post_init__(**kwargs)

    def _check_no_slices(self) -> None:
        allowed = None if self.guidance == "none" else self.text_config.hidden_size
        if self.slice_config is not None or self.vision_config.slice_hidden_size not in (None, allowed):
            raise ValueError(
                f'guidance is "{self.guidance}", but a slice_config was given: use guidance="slices" for stage 2.'
            )


@strict
class HSENetConfig(PreTrainedConfig):
    r"""
    Two 3D encoders, a projector (spatial packer) for each, and a causal language model (paper section 3.3).

    Args:
        encoders (`"both"`, `"global"` or `"local"`): which 3D encoders the language model sees (paper table 3).
        vision_config (`HSENetVisionConfig` or `dict`, *optional*): the global 3D encoder.
        local_vision_config (`HSENetVisionConfig` or `dict`, *optional*):
            The local (2E3) encoder. By default the global encoder's sizes, with slice guidance.
        slice_config (`HSENetVisionConfig` or `dict`, *optional*):
            The 2D encoder of the slices; as in [`HSENetCLIPConfig`], there is none by default if
            `local_vision_config` has its own `slice_hidden_size`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any causal language model with a bias-free output head; Phi-4-mini's sizes by default (its long-context
            rotary factors come with the checkpoint's own configuration).
        projector (`"spatial_packer"`, `"spatial_pooling"`, `"sequence_pooling"`, `"qformer"` or `"mlp"`):
            What makes tokens of patches (paper table 2b); all give as many tokens. `"mlp"` takes a window's patches
            side by side, `"sequence_pooling"` the mean of patches that follow each other, `"qformer"` learned queries.
        packer_window_size (`tuple[int, int, int]`): patches that one packed token stands for; divides the patch grid.
        packer_dropout (`float`):
            Dropout on the packers' attention weights and output while training; in the Q-Former everywhere.
        packer_residual (`"projected_query"` or `"query"`):
            As `scorer_residual` of [`HSENetVisionConfig`], for the packers; the query is the window's mean.
        qformer_num_layers (`int`): blocks of the Q-Former; two have about the weights of a packer.
        num_slices (`int`): axial slices a volume.
        image_token_id (`int`): id of the placeholder that the packed tokens replace.
    """

    model_type = "hsenet"
    _auto_class = "AutoConfig"
    sub_configs = {
        "vision_config": HSENetVisionConfig,
        "local_vision_config": HSENetVisionConfig,
        "slice_config": HSENetVisionConfig,
        "text_config": AutoConfig,
    }

    encoders: Literal["both", "global", "local"] = "both"
    vision_config: dict | PreTrainedConfig | None = None
    local_vision_config: dict | PreTrainedConfig | None = None
    slice_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector: Literal["spatial_packer", "spatial_pooling", "sequence_pooling", "qformer", "mlp"] = "spatial_packer"
    packer_window_size: list[int] | tuple[int, ...] = (1, 4, 4)
    packer_dropout: float = 0.1
    packer_residual: Literal["projected_query", "query"] = "projected_query"
    qformer_num_layers: int = 2
    num_slices: int = 32
    image_token_id: int = 200029
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.packer_window_size = _three_sizes("packer_window_size", self.packer_window_size)
        self.text_config = _text_config(self.text_config, default=_phi4_mini_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.vision_config = _vision_config(self.vision_config)
        if self.vision_config.slice_hidden_size is not None:
            raise ValueError(
                f"vision_config is the global encoder's, without slice guidance, got slice_hidden_size "
                f"{self.vision_config.slice_hidden_size}: pass a 2E3 encoder's as local_vision_config."
            )
        if self.encoders != "global":
            self.local_vision_config = _vision_config(self.local_vision_config or self.vision_config)
            self.slice_config = _slice_config(self.slice_config, self.local_vision_config)
        # A configuration that no module uses would only confuse, so each exists exactly with its encoder.
        if self.encoders == "global":
            self.slice_config = self.local_vision_config = None
        if self.encoders == "local":
            self.vision_config = None
        for encoder in self._encoder_configs():
            if any(grid % window for grid, window in zip(encoder.grid_size, self.packer_window_size, strict=True)):
                raise ValueError(
                    f"The patch grid {encoder.grid_size} should be divisible by packer_window_size "
                    f"{self.packer_window_size}."
                )
        if self.qformer_num_layers < 1:
            raise ValueError(f"qformer_num_layers should be at least 1, got {self.qformer_num_layers}.")
        super().__post_init__(**kwargs)

    def _encoder_configs(self) -> list[HSENetVisionConfig]:
        return [config for config in (self.vision_config, self.local_vision_config) if config is not None]

    @property
    def image_seq_length(self) -> int:
        """Tokens that one volume takes in the prompt: 128 an encoder, 256 by default."""
        return sum(config.num_patches // prod(self.packer_window_size) for config in self._encoder_configs())


def _three_sizes(name: str, sizes: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{name} should be three positive numbers (depth, height, width), got {tuple(sizes)}.")
    return tuple(sizes)


def _vision_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    return _own(HSENetVisionConfig(**(config or {})) if config is None or isinstance(config, dict) else config)


def _own(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy, on which more is set, that keeps no trace of the folder that another model came from."""
    config = deepcopy(config)
    config._name_or_path = ""
    return config


def _slice_config(config: dict | PreTrainedConfig | None, guided: PreTrainedConfig) -> PreTrainedConfig | None:
    """The 2D encoder's, whose width `guided` takes over; none where `guided` alone says how wide features are."""
    if config is None and guided.slice_hidden_size is not None:
        return None
    if config is None:  # BiomedCLIP's ViT-B/16
        config = {"image_size": (1, 224, 224), "patch_size": (1, 16, 16), "num_channels": 3, "qkv_bias": True}
        config["layer_norm_eps"] = 1e-6
    config = _vision_config(config)
    guided.slice_hidden_size = config.hidden_size
    return config


def _text_config(config: dict | PreTrainedConfig | None, default) -> PreTrainedConfig:
    if config is None:
        return default()
    return _own(AutoConfig.for_model(**config) if isinstance(config, dict) else config)


def _phi4_mini_config() -> Phi3Config:
    return Phi3Config(
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    )


__all__ = ["HSENetCLIPConfig", "HSENetConfig", "HSENetVisionConfig"]
