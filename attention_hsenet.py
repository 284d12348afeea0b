# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The attention of HSENet: the encoders' own, the cross-attention that scorer and packer share, and the scorer."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


try:
    from .configuration_hsenet import HSENetVisionConfig
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from configuration_hsenet import HSENetVisionConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (batch, heads, queries, keys)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the configuration implements it: `(batch, heads, length, head_dim)` to `(batch, length, heads,
    head_dim)`, and the weights where the implementation has them. The mask is added to the scores."""
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    dropout = module.attention_dropout if module.training else 0.0
    return attention_interface(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, is_causal=module.is_causal
    )


class HSENetAttention(nn.Module):
    """Multi-head self-attention over CLS and patches."""

    def __init__(self, config: HSENetVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, hidden_size = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, head_dim)
        attended, weights = attend(self, query, key, value)
        return self.out_proj(attended.reshape(batch, length, hidden_size)), weights


class HSENetCrossAttention(nn.Module):
    """Single-head cross-attention of queries to a context of the same or another width, then LayerNorm.

    The residual is the query after its projection (in the released weights) or before it.
    """

    def __init__(self, config: PreTrainedConfig, sizes: tuple[int, int], dropout: float, residual: str, eps: float):
        super().__init__()
        hidden_size, context_size = sizes
        self.config = config
        self.attention_dropout = dropout
        self.projected_residual = residual == "projected_query"
        self.scaling = hidden_size**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(context_size, hidden_size)
        self.v_proj = nn.Linear(context_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(
        self, queries: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.q_proj(queries)  # (batch, num_queries, hidden_size)
        key, value = self.k_proj(context), self.v_proj(context)  # (batch, num_keys, hidden_size)
        mask = None
        if context_mask is not None:  # (batch, num_keys), 0 where nobody looks
            hidden = torch.zeros_like(context_mask, dtype=query.dtype)
            hidden = hidden.masked_fill(context_mask == 0, torch.finfo(query.dtype).min)
            mask = hidden[:, None, None, :]  # (batch, heads, num_queries, num_keys)
        attended, weights = attend(self, query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask)
        attended = self.out_proj(attended.reshape(query.shape))
        weights = weights.squeeze(1) if weights is not None else None  # (batch, num_queries, num_keys)
        residual = query if self.projected_residual else queries
        return self.norm(residual + self.dropout(attended)), weights


class HSENetSliceGuidedScorer(nn.Module):
    """Gives each 3D patch a weight in (0, 1) from what the 2D slices show (2E3, paper section 3.2).

    Or from what the report says, in the ablations of table 1b.
    """

    def __init__(self, config: HSENetVisionConfig):
        super().__init__()
        sizes = (config.hidden_size, config.slice_hidden_size)
        self.attention = HSENetCrossAttention(
            config, sizes, config.scorer_dropout, config.scorer_residual, config.layer_norm_eps
        )
        self.score_proj = nn.Linear(config.hidden_size, 1)

    def forward(
        self, patch_states: torch.Tensor, slice_features: torch.Tensor, guidance_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        guided, weights = self.attention(patch_states, slice_features, guidance_mask)
        return torch.sigmoid(self.score_proj(guided)), weights  # (batch, num_patches, 1)
