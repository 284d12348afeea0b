# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The tensor names of the released checkpoints, and ours. See `name_table.py` for how to read the patterns."""

import torch

from hsenet.name_table import Computed, Dropped, NameTable


def _logarithm(scale: torch.Tensor) -> tuple[torch.Tensor]:
    """logarithm: the source multiplies by its scale, ours by the exponential of a logarithm"""
    if not scale.is_meta and scale.item() <= 0:
        raise ValueError(f"expected a positive scale, got {scale.item()}")
    return (scale.log(),)


def _fold_cls_position(cls_token: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """the position embedding of CLS, first of all, is added to the CLS token"""
    return cls_token + positions[:, :1], positions[:, 1:].contiguous()


def _linear_from_convolution(kernel: torch.Tensor) -> tuple[torch.Tensor]:
    """a convolution over whole patches as a matrix: rows run over height, width, channel"""
    return (kernel.permute(0, 2, 3, 1).flatten(1),)  # (hidden, channels, height, width) before


def _concatenated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor]:
    """query, key and value in one matrix"""
    return (torch.cat([query, key, value]),)


# HSENet's 3D ViT, the same in M3D-CLIP; stage 2 adds the scorer.
GLOBAL_ENCODER = NameTable(
    {
        "cls_token": "cls_token",
        "patch_embedding.position_embeddings": "embeddings.position_embeddings",
        "patch_embedding.patch_embeddings.1.*": "embeddings.projection.*",
        "blocks.#.norm1.*": "layers.#.norm1.*",
        "blocks.#.attn.qkv.*": "layers.#.attention.qkv.*",
        "blocks.#.attn.out_proj.*": "layers.#.attention.out_proj.*",
        "blocks.#.norm2.*": "layers.#.norm2.*",
        "blocks.#.mlp.linear1.*": "layers.#.mlp.fc1.*",
        "blocks.#.mlp.linear2.*": "layers.#.mlp.fc2.*",
        "norm.*": "norm.*",
    }
)
LOCAL_ENCODER = GLOBAL_ENCODER | NameTable(
    {
        "slice_guided_attention.Wq.*": "scorer.attention.q_proj.*",
        "slice_guided_attention.Wk.*": "scorer.attention.k_proj.*",
        "slice_guided_attention.Wv.*": "scorer.attention.v_proj.*",
        "slice_guided_attention.output_linear.*": "scorer.attention.out_proj.*",
        "slice_guided_attention.norm.*": "scorer.attention.norm.*",
        "patch_score_proj.*": "scorer.score_proj.*",
    }
)
BERT = NameTable(
    {
        name: name
        for name in (
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "embeddings.LayerNorm.*",
            "encoder.layer.#.attention.self.query.*",
            "encoder.layer.#.attention.self.key.*",
            "encoder.layer.#.attention.self.value.*",
            "encoder.layer.#.attention.output.dense.*",
            "encoder.layer.#.attention.output.LayerNorm.*",
            "encoder.layer.#.intermediate.dense.*",
            "encoder.layer.#.output.dense.*",
            "encoder.layer.#.output.LayerNorm.*",
        )
    },
    dropped={
        "pooler.dense.*": Dropped(
            "never used: a report's embedding is the CLS token itself",
            shaped_like="encoder.layer.0.attention.self.query.*",
        ),
        "embeddings.position_ids": Dropped("not a weight: 0, 1, 2, ..."),
    },
)
_HEADS = NameTable(
    {"mm_vision_proj.*": "visual_projection.*", "mm_language_proj.*": "text_projection.*"},
    computed=(Computed(("logit_scale",), ("logit_scale",), _logarithm),),
) | BERT.under("language_encoder.", "text_model.")
STAGE1_CLIP = GLOBAL_ENCODER.under("vision_encoder.", "vision_model.") | _HEADS
STAGE2_CLIP = LOCAL_ENCODER.under("vision_encoder.", "vision_model.") | _HEADS
TEACHER_PREFIX = "stage1_pretrained_CLIP."  # in the file of stage 2: the complete, frozen stage 1

PACKER = NameTable(
    {
        "resolution_attention.Wq.*": "attention.q_proj.*",
        "resolution_attention.Wk.*": "attention.k_proj.*",
        "resolution_attention.Wv.*": "attention.v_proj.*",
        "resolution_attention.output_linear.*": "attention.out_proj.*",
        "resolution_attention.norm.*": "attention.norm.*",
        "proj_mpls.0.*": "fc1.*",
        "proj_mpls.2.*": "fc2.*",
    }
)
# What stage 3 trained, as a PEFT adapter of our model.
_PEFT = "base_model.model.model."
VLM_ADAPTER = (
    PACKER.under(f"{_PEFT}mm_projector.", f"{_PEFT}multi_modal_projector.global_packer.")
    | PACKER.under(f"{_PEFT}mm_projector2.", f"{_PEFT}multi_modal_projector.local_packer.")
    | NameTable(
        {
            f"{_PEFT}layers.**.lora_A.default.weight": f"{_PEFT}language_model.layers.**.lora_A.weight",
            f"{_PEFT}layers.**.lora_B.default.weight": f"{_PEFT}language_model.layers.**.lora_B.weight",
        }
    )
)

# open_clip's BiomedCLIP: timm's ViT under `visual.trunk.`.
BIOMEDCLIP = NameTable(
    {
        "visual.trunk.patch_embed.proj.bias": "embeddings.projection.bias",
        "visual.trunk.blocks.#.norm1.*": "layers.#.norm1.*",
        "visual.trunk.blocks.#.attn.qkv.*": "layers.#.attention.qkv.*",
        "visual.trunk.blocks.#.attn.proj.*": "layers.#.attention.out_proj.*",
        "visual.trunk.blocks.#.norm2.*": "layers.#.norm2.*",
        "visual.trunk.blocks.#.mlp.fc1.*": "layers.#.mlp.fc1.*",
        "visual.trunk.blocks.#.mlp.fc2.*": "layers.#.mlp.fc2.*",
        "visual.trunk.norm.*": "norm.*",
    },
    computed=(
        Computed(
            ("visual.trunk.cls_token", "visual.trunk.pos_embed"),
            ("cls_token", "embeddings.position_embeddings"),
            _fold_cls_position,
        ),
        Computed(
            ("visual.trunk.patch_embed.proj.weight",), ("embeddings.projection.weight",), _linear_from_convolution
        ),
    ),
    dropped={
        "visual.head.**": Dropped("BiomedCLIP's own projection: slices enter HSENet before it"),
        "text.**": Dropped("BiomedCLIP's text encoder: HSENet has its own"),
        "logit_scale": Dropped("BiomedCLIP's temperature"),
    },
)

# transformers' ViT as it lies on disk, whatever its modules are called in the installed version.
VIT = NameTable(
    {
        "embeddings.patch_embeddings.projection.bias": "embeddings.projection.bias",
        "encoder.layer.#.layernorm_before.*": "layers.#.norm1.*",
        "encoder.layer.#.attention.output.dense.*": "layers.#.attention.out_proj.*",
        "encoder.layer.#.layernorm_after.*": "layers.#.norm2.*",
        "encoder.layer.#.intermediate.dense.*": "layers.#.mlp.fc1.*",
        "encoder.layer.#.output.dense.*": "layers.#.mlp.fc2.*",
        "layernorm.*": "norm.*",
    },
    computed=(
        Computed(
            ("embeddings.cls_token", "embeddings.position_embeddings"),
            ("cls_token", "embeddings.position_embeddings"),
            _fold_cls_position,
        ),
        Computed(
            ("embeddings.patch_embeddings.projection.weight",),
            ("embeddings.projection.weight",),
            _linear_from_convolution,
        ),
        Computed(
            tuple(f"encoder.layer.#.attention.attention.{part}.*" for part in ("query", "key", "value")),
            ("layers.#.attention.qkv.*",),
            _concatenated,
        ),
    ),
    dropped={"pooler.dense.*": Dropped("never used: a slice's feature is the CLS token itself")},
)
VIT_CLASSIFIER = VIT.under("vit.", "") | NameTable(
    dropped={"classifier.*": Dropped("the head of another task")}
)  # as `ViTForImageClassification` saves it
