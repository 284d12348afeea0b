# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The projectors of HSENet (paper section 3.3, table 2b): patches of a 3D encoder to tokens of the language model.

Every projector gives one token for each window of `config.packer_window_size` patches, so that they can be compared,
and ends in the same two linear layers. The paper's is the spatial packer; the others are its rivals.
"""

from math import prod

import torch
from torch import nn
from transformers.activations import ACT2FN


try:
    from .attention_hsenet import HSENetCrossAttention
    from .configuration_hsenet import HSENetConfig, HSENetVisionConfig
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from attention_hsenet import HSENetCrossAttention
    from configuration_hsenet import HSENetConfig, HSENetVisionConfig


class HSENetProjector(nn.Module):
    """What all projectors share: the windows of the patch grid, and the layers that end in the text's width."""

    def __init__(self, config: HSENetConfig, vision_config: HSENetVisionConfig):
        super().__init__()
        self.grid_size = vision_config.grid_size
        self.window_size = config.packer_window_size
        self.num_tokens = vision_config.num_patches // prod(self.window_size)
        self.build(config, vision_config)

    def build(self, config: HSENetConfig, vision_config: HSENetVisionConfig) -> None:
        self.add_mlp(vision_config.hidden_size, config, vision_config)

    def add_mlp(self, input_size: int, config: HSENetConfig, vision_config: HSENetVisionConfig) -> None:
        text_width = config.text_config.hidden_size
        self.fc1 = nn.Linear(input_size, text_width)
        self.activation = ACT2FN[vision_config.hidden_act]
        self.fc2 = nn.Linear(text_width, text_width)

    def forward(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, num_patches, hidden_size)` to `(batch, num_tokens, text_hidden_size)`, and attention weights."""
        packed, weights = self.pack(patch_states)  # (batch, num_tokens, input_size)
        return self.fc2(self.activation(self.fc1(packed))), weights

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError

    def split_windows(self, patch_states: torch.Tensor) -> torch.Tensor:
        """`(batch, num_patches, hidden_size)` to `(batch * num_tokens, window_patches, hidden_size)`."""
        (grid_d, grid_h, grid_w), (win_d, win_h, win_w) = self.grid_size, self.window_size
        # (batch, windows_d, win_d, windows_h, win_h, windows_w, win_w, hidden_size)
        windows = patch_states.reshape(
            -1, grid_d // win_d, win_d, grid_h // win_h, win_h, grid_w // win_w, win_w, patch_states.shape[-1]
        )
        # (batch, windows_d, windows_h, windows_w, win_d, win_h, win_w, hidden_size)
        windows = windows.permute(0, 1, 3, 5, 2, 4, 6, 7)
        return windows.flatten(4, 6).flatten(0, 3)


class HSENetSpatialPacker(HSENetProjector):
    """Packs each window of patches into one token: voxel-to-point cross-attention (paper section 3.3).

    The window's mean is the query (point), its patches are keys and values (voxels).
    """

    def build(self, config: HSENetConfig, vision_config: HSENetVisionConfig) -> None:
        width = vision_config.hidden_size
        self.attention = HSENetCrossAttention(
            config, (width, width), config.packer_dropout, config.packer_residual, vision_config.layer_norm_eps
        )
        self.add_mlp(width, config, vision_config)

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        voxel_states = self.split_windows(patch_states)  # (batch * num_windows, window_patches, hidden_size)
        point_states = voxel_states.mean(dim=1, keepdim=True)  # (batch * num_windows, 1, hidden_size)
        packed, weights = self.attention(point_states, voxel_states)
        return packed.reshape(patch_states.shape[0], -1, patch_states.shape[-1]), weights


class HSENetSpatialPooling(HSENetProjector):
    """The mean of each window: the packer without its attention."""

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        pooled = self.split_windows(patch_states).mean(dim=1)  # (batch * num_windows, hidden_size)
        return pooled.unflatten(0, (patch_states.shape[0], -1)), None


class HSENetSequencePooling(HSENetProjector):
    """The mean of so many patches that follow each other in raster order: neighbours along the width only."""

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return patch_states.unflatten(1, (self.num_tokens, -1)).mean(dim=2), None


class HSENetQFormer(HSENetProjector):
    """Learned queries that look at all patches and at each other (BLIP-2, arXiv 2301.12597), one query a token.

    A block is self-attention, cross-attention and feed-forward, each followed by its LayerNorm. The public code's
    Q-Former mixed the volumes of a batch and had a quarter of the packer's tokens; this one does neither.
    """

    def build(self, config: HSENetConfig, vision_config: HSENetVisionConfig) -> None:
        width = vision_config.hidden_size
        self.queries = nn.Parameter(torch.empty(1, self.num_tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                vision_config.num_attention_heads,
                vision_config.intermediate_size,
                dropout=config.packer_dropout,
                activation=ACT2FN[vision_config.hidden_act],
                layer_norm_eps=vision_config.layer_norm_eps,
                batch_first=True,
            )
            for _ in range(config.qformer_num_layers)
        )
        self.add_mlp(width, config, vision_config)

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        states = self.queries.expand(patch_states.shape[0], -1, -1)
        for layer in self.layers:
            states = layer(states, patch_states)
        return states, None


class HSENetWindowMLP(HSENetProjector):
    """All patches of a window side by side into the two layers; with windows of one patch LLaVA's projector.

    The public code's MLP from all patches to all tokens would have 1.5e11 weights and cannot be built.
    """

    def build(self, config: HSENetConfig, vision_config: HSENetVisionConfig) -> None:
        self.add_mlp(prod(self.window_size) * vision_config.hidden_size, config, vision_config)

    def pack(self, patch_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        windows = self.split_windows(patch_states)
        return windows.flatten(1).unflatten(0, (patch_states.shape[0], -1)), None


PROJECTORS = {
    "spatial_packer": HSENetSpatialPacker,
    "spatial_pooling": HSENetSpatialPooling,
    "sequence_pooling": HSENetSequencePooling,
    "qformer": HSENetQFormer,
    "mlp": HSENetWindowMLP,
}


class HSENetMultiModalProjector(nn.Module):
    """One projector for each 3D encoder; their tokens follow each other, global first.

    They are called packers whatever `config.projector` says: so their weights have the same names.
    """

    def __init__(self, config: HSENetConfig):
        super().__init__()
        encoders = (config.vision_config, config.local_vision_config)
        self.global_packer, self.local_packer = (
            PROJECTORS[config.projector](config, encoder) if encoder is not None else None for encoder in encoders
        )

    def forward(self, global_states: torch.Tensor | None, local_states: torch.Tensor | None) -> torch.Tensor:
        pairs = ((self.global_packer, global_states), (self.local_packer, local_states))
        packed = [packer(states)[0] for packer, states in pairs if packer is not None]
        return torch.cat(packed, dim=1)  # (batch, image_seq_length, text_hidden_size)
