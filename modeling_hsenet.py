# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""HSENet (arXiv 2506.09634) in PyTorch: everything that happens in a forward pass.

Volumes enter as `pixel_values` (batch, 1, depth, height, width), axial slices as `slice_pixel_values`
(batch, num_slices, 3, height, width). `HSENetVisionModel` is each of the three ViTs: the global 3D encoder, the
local one (2E3), whose patches are weighed by a slice-guided scorer, and the 2D encoder of the slices.
`HSENetCLIPModel` compares volumes with reports; `HSENetForConditionalGeneration` writes about volumes. Attention and
what stands between encoders and language model are in `attention_hsenet.py` and `projectors_hsenet.py`.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import ModelOutput, can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


try:
    from .attention_hsenet import HSENetAttention, HSENetSliceGuidedScorer
    from .configuration_hsenet import HSENetCLIPConfig, HSENetConfig, HSENetVisionConfig
    from .projectors_hsenet import PROJECTORS, HSENetMultiModalProjector, HSENetQFormer
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from attention_hsenet import HSENetAttention, HSENetSliceGuidedScorer
    from configuration_hsenet import HSENetCLIPConfig, HSENetConfig, HSENetVisionConfig
    from projectors_hsenet import PROJECTORS, HSENetMultiModalProjector, HSENetQFormer


@dataclass
class HSENetVisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, 1 + num_patches, hidden_size)`): CLS first, then patches.
        pooler_output (`torch.Tensor` of shape `(batch, hidden_size)`): the CLS token.
        patch_scores (`torch.Tensor` of shape `(batch, *grid_size)`, *optional*):
            Weight in (0, 1) that the slices give to each patch; only from an encoder with a scorer.
        slice_attentions (`torch.Tensor` of shape `(batch, num_patches, num_slices)`, *optional*):
            How much each patch looked at each slice; only with eager attention.
    """

    patch_scores: torch.Tensor | None = None
    slice_attentions: torch.Tensor | None = None


@dataclass
class HSENetCLIPOutput(ModelOutput):
    """
    Args:
        logits_per_image (`torch.Tensor` of shape `(num_volumes, num_texts)`): cosines times the temperature.
        logits_per_text (`torch.Tensor` of shape `(num_texts, num_volumes)`): their transpose.
        image_embeds (`torch.Tensor` of shape `(num_volumes, projection_dim)`): L2-normalised.
        text_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`): L2-normalised.
        patch_scores (`torch.Tensor` of shape `(num_volumes, *grid_size)`, *optional*):
            With `output_patch_scores=True`: the slices' weight on each patch.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    patch_scores: torch.Tensor | None = None


@dataclass
class HSENetImageFeatures(BaseModelOutputWithPooling):
    """
    Args:
        pooler_output (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`):
            The packed tokens of each volume, global encoder first, as they enter the language model.
        patch_scores (`torch.Tensor` of shape `(num_volumes, *grid_size)`, *optional*): of the local encoder.
    """

    patch_scores: torch.Tensor | None = None


@dataclass
class HSENetPatchFeatures(ModelOutput):
    """
    Args:
        global_patch_features (`torch.Tensor` of shape `(num_volumes, num_patches, hidden_size)`, *optional*):
            What the global encoder says of each patch, without CLS.
        local_patch_features (`torch.Tensor` of shape `(num_volumes, num_patches, hidden_size)`, *optional*).
        patch_scores (`torch.Tensor` of shape `(num_volumes, *grid_size)`, *optional*): of the local encoder.
    """

    global_patch_features: torch.Tensor | None = None
    local_patch_features: torch.Tensor | None = None
    patch_scores: torch.Tensor | None = None


@dataclass
class HSENetModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`, *optional*).
        patch_scores (`torch.Tensor` of shape `(num_volumes, *grid_size)`, *optional*).
    """

    image_hidden_states: torch.Tensor | None = None
    patch_scores: torch.Tensor | None = None


@dataclass
class HSENetCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): next-token cross-entropy over the labels that are not -100.
        logits (`torch.Tensor` of shape `(batch, sequence_length, vocab_size)`, *optional*):
            Left out while training with labels, unless `skip_logits=False`.
        image_hidden_states (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`, *optional*).
        patch_scores (`torch.Tensor` of shape `(num_volumes, *grid_size)`, *optional*):
            With `output_patch_scores=True`: the slices' weight on each patch of the local encoder.
    """

    image_hidden_states: torch.Tensor | None = None
    patch_scores: torch.Tensor | None = None


# transformers has called it `cache` since 5.24, `past_key_values` before; here it only passes through.
_CACHE_NAMES = ("cache", "past_key_values")


def _cache_in(values: dict) -> dict[str, Cache]:
    """The language model's cache of keys and values, if any, under its name in the installed transformers."""
    return {name: value for name, value in values.items() if name in _CACHE_NAMES and value is not None}


class HSENetPatchEmbeddings(nn.Module):
    """Cuts a volume into patches, projects each and adds its learned position (paper section 3.1)."""

    def __init__(self, config: HSENetVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid_size = config.grid_size
        self.num_channels = config.num_channels
        self.projection = nn.Linear(config.num_channels * prod(config.patch_size), config.hidden_size)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        expected = (self.num_channels, *self.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"Expected pixel values of shape (batch, {', '.join(map(str, expected))}), that is (batch, channels, "
                f"depth, height, width), got {tuple(pixel_values.shape)}. Prepare volumes with the model's processor."
            )
        (grid_d, grid_h, grid_w), (patch_d, patch_h, patch_w) = self.grid_size, self.patch_size
        # (batch, channel, grid_d, patch_d, grid_h, patch_h, grid_w, patch_w)
        patches = pixel_values.reshape(-1, self.num_channels, grid_d, patch_d, grid_h, patch_h, grid_w, patch_w)
        # (batch, grid_d, grid_h, grid_w, patch_d, patch_h, patch_w, channel): raster order, the channel fastest
        patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1)
        patches = patches.flatten(4).flatten(1, 3)  # (batch, num_patches, patch_dim)
        return self.projection(patches.to(self.position_embeddings.dtype)) + self.position_embeddings


class HSENetMLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: HSENetVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class HSENetEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: HSENetVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HSENetAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HSENetMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


class HSENetPreTrainedModel(PreTrainedModel):
    config: PreTrainedConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "HSENetEncoderLayer",
        "HSENetPatchEmbeddings",
        *(projector.__name__ for projector in PROJECTORS.values()),
    ]
    _skip_keys_device_placement = list(_CACHE_NAMES)
    # Scorer and packers have one head as wide as the encoder: wider than FlashAttention's and flex's kernels take.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As [`PreTrainedModel.from_pretrained`], but a weight that the files do not give is an error, not a guess."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if wrong := [*sorted(info["missing_keys"]), *sorted(map(str, info["mismatched_keys"]))]:
            raise ValueError(
                f"{len(wrong)} weights of {cls.__name__} are missing in the files or have another shape, and would "
                f"start at random: {', '.join(wrong[:10])}{', ...' if len(wrong) > 10 else ''}. Expected a complete "
                "checkpoint: download or convert it again."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear, queries: normal(0, initializer_range), zero bias. LayerNorm: 1, 0. Positions: truncated. CLS: 0."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HSENetPatchEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, HSENetQFormer):
            init.normal_(module.queries, std=std)
        elif isinstance(module, HSENetVisionModel):
            init.zeros_(module.cls_token)
        elif isinstance(module, HSENetCLIPModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class HSENetVisionModel(HSENetPreTrainedModel):
    """A ViT over volumes (or slices), with the slice-guided scorer when `config.slice_hidden_size` is set."""

    config: HSENetVisionConfig
    _auto_class = "AutoModel"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": HSENetEncoderLayer, "attentions": HSENetAttention}

    def __init__(self, config: HSENetVisionConfig):
        super().__init__(config)
        self.embeddings = HSENetPatchEmbeddings(config)
        self.scorer = HSENetSliceGuidedScorer(config) if config.slice_hidden_size is not None else None
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.layers = nn.ModuleList([HSENetEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        slice_features: torch.Tensor | None = None,
        guidance_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> HSENetVisionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, *image_size)`).
            slice_features (`torch.Tensor` of shape `(batch, num_slices, slice_hidden_size)`, *optional*):
                Required by, and only for, an encoder with a scorer; of slices, or a report's token states.
            guidance_mask (`torch.Tensor` of shape `(batch, num_slices)`, *optional*):
                0 for features that do not count: the padding of a report.
        """
        self._check_slice_features(pixel_values, slice_features)
        hidden_states = self.embeddings(pixel_values)  # (batch, num_patches, hidden_size)
        patch_scores = slice_attentions = None
        if self.scorer is not None:
            scores, slice_attentions = self.scorer(
                hidden_states, slice_features.to(hidden_states.dtype), guidance_mask
            )
            hidden_states = hidden_states * scores
            patch_scores = scores.reshape(-1, *self.config.grid_size)
        if self.training and self.config.patch_dropout:
            hidden_states = self._drop_patches(hidden_states)
        # CLS has no position embedding and no score.
        cls_token = self.cls_token.expand(hidden_states.shape[0], -1, -1)
        hidden_states = torch.cat([cls_token, hidden_states], dim=1)  # (batch, 1 + num_patches, hidden_size)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        return HSENetVisionOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            patch_scores=patch_scores,
            slice_attentions=slice_attentions,
        )

    def _drop_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A random part of each volume's patches, `(batch, kept, hidden_size)`; each keeps its position embedding."""
        batch, num_patches, hidden_size = hidden_states.shape
        kept = max(round(num_patches * (1 - self.config.patch_dropout)), 1)
        chosen = torch.rand(batch, num_patches, device=hidden_states.device).argsort(dim=1)[:, :kept]
        return hidden_states.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden_size))

    def _check_slice_features(self, pixel_values: torch.Tensor, slice_features: torch.Tensor | None) -> None:
        if self.scorer is None:
            if slice_features is not None:
                raise ValueError("This encoder has no slice guidance, but slice features were given: leave them out.")
            return
        if slice_features is None:
            raise ValueError(
                "This encoder is guided by 2D slices: pass slice_pixel_values (batch, num_slices, 3, height, width) "
                "from the processor, or cached slice_features (batch, num_slices, slice_hidden_size)."
            )
        batch, width = pixel_values.shape[0], self.config.slice_hidden_size
        if slice_features.ndim != 3 or slice_features.shape[0] != batch or slice_features.shape[2] != width:
            raise ValueError(
                f"Expected slice features of shape ({batch}, num_slices, {width}), got {tuple(slice_features.shape)}."
            )


class HSENetSliceGuidedModel(HSENetPreTrainedModel):
    """What both models with slice guidance share: the frozen 2D encoder, run on every slice."""

    def get_slice_features(self, slice_pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            slice_pixel_values (`torch.Tensor` of shape `(batch, num_slices, channels, height, width)`).

        Returns:
            `torch.Tensor` of shape `(batch, num_slices, slice_hidden_size)`: the CLS token of each slice.
        """
        if self.slice_encoder is None:
            raise ValueError(
                "This model has no 2D encoder of slices, but slices were given: leave slice_pixel_values out, or pass "
                "cached slice_features if it has slice guidance."
            )
        if slice_pixel_values.ndim != 5 or slice_pixel_values.shape[1] != self.config.num_slices:
            raise ValueError(
                f"Expected slice_pixel_values of shape (batch, {self.config.num_slices}, channels, height, width), "
                f"got {tuple(slice_pixel_values.shape)}."
            )
        pictures = slice_pixel_values.flatten(0, 1).unsqueeze(2)  # (batch * num_slices, channels, 1, height, width)
        features = self.slice_encoder(pictures).pooler_output
        return features.unflatten(0, slice_pixel_values.shape[:2])

    def _slice_features(
        self, slice_pixel_values: torch.Tensor | None, slice_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        if slice_pixel_values is None:
            return slice_features
        if slice_features is not None:
            raise ValueError("Pass slice_pixel_values or slice_features, not both.")
        return self.get_slice_features(slice_pixel_values)


class HSENetCLIPModel(HSENetSliceGuidedModel):
    """Volumes and reports in one embedding space: stage 1 (global encoder) and stage 2 (2E3 encoder).

    With `guidance="text"` or `"text_cls"` (paper table 1b) a volume's embedding depends on the report that guides it.
    Guided by its own report it has seen the answer: retrieval is then measured over all pairs, each volume guided by
    each report, see `hsenet.evaluation.guided_similarity`.
    """

    config: HSENetCLIPConfig
    main_input_name = "pixel_values"
    _auto_class = "AutoModel"

    def __init__(self, config: HSENetCLIPConfig):
        super().__init__(config)
        self.vision_model = HSENetVisionModel(config.vision_config)
        self.slice_encoder = HSENetVisionModel(config.slice_config) if config.slice_config is not None else None
        # The report's embedding is the CLS token itself: BERT's pooler would be parameters that never train.
        self.text_model = AutoModel.from_config(config.text_config, add_pooling_layer=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of words, which FSDP2 shards apart."""
        return self.text_model.get_input_embeddings()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
        text_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> HSENetVisionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_volumes, 1, depth, height, width)`).
            slice_pixel_values (`torch.Tensor` of shape `(num_volumes, num_slices, 3, height, width)`, *optional*).
            slice_features (`torch.Tensor` of shape `(num_volumes, num_slices, slice_hidden_size)`, *optional*).
            text_states (`torch.Tensor` of shape `(num_volumes, sequence_length, text_hidden_size)`, *optional*):
                With guidance by text: `last_hidden_state` of [`~HSENetCLIPModel.get_text_features`], one a volume.
            attention_mask (`torch.Tensor` of shape `(num_volumes, sequence_length)`, *optional*): of these texts.

        Returns:
            [`HSENetVisionOutput`]: `pooler_output` is the projected embedding `(num_volumes, projection_dim)`, not
            normalised.
        """
        mask = None
        if self.guided_by_text:
            features, mask = self._text_guidance(pixel_values, text_states, attention_mask)
        else:
            features = self._slice_features(slice_pixel_values, slice_features)
        vision_outputs = self.vision_model(pixel_values, features, mask, **kwargs)
        vision_outputs.pooler_output = self.visual_projection(vision_outputs.pooler_output)
        return vision_outputs

    @property
    def guided_by_text(self) -> bool:
        return self.config.guidance in ("text", "text_cls")

    def _text_guidance(
        self, pixel_values: torch.Tensor, text_states: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the scorer reads of the texts: all their tokens, or CLS alone."""
        if text_states is None or len(text_states) != len(pixel_values):
            raise ValueError(
                f"This model's patches are scored by a report, so that a volume has no embedding of its own: expected "
                f"the token states of {len(pixel_values)} texts, got "
                f"{'none' if text_states is None else len(text_states)}. Call the model with as many texts as volumes."
            )
        if self.config.guidance == "text_cls":
            return text_states[:, :1], None
        return text_states, attention_mask

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(num_texts, sequence_length)`).
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*).

        Returns:
            [`BaseModelOutputWithPooling`]: `pooler_output` is the projected embedding `(num_texts, projection_dim)`,
            not normalised.
        """
        text_outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=text_outputs.last_hidden_state,
            pooler_output=self.text_projection(text_outputs.last_hidden_state[:, 0]),
            hidden_states=text_outputs.hidden_states,
            attentions=text_outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
        output_patch_scores: bool = False,
        **kwargs,
    ) -> HSENetCLIPOutput:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(num_texts, sequence_length)`).
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*).
            pixel_values, slice_pixel_values, slice_features: see [`~HSENetCLIPModel.get_image_features`]. With
                guidance by text, text i guides volume i.
            output_patch_scores (`bool`): whether to return the slices' weights on the patch grid.
        """
        text_outputs = self.get_text_features(input_ids, attention_mask)
        text = (text_outputs.last_hidden_state, attention_mask) if self.guided_by_text else ()
        image_outputs = self.get_image_features(pixel_values, slice_pixel_values, slice_features, *text)
        image_embeds = nn.functional.normalize(image_outputs.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        logits_per_image = self.logit_scale.exp() * image_embeds @ text_embeds.t()
        return HSENetCLIPOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            patch_scores=image_outputs.patch_scores if output_patch_scores else None,
        )


class HSENetModel(HSENetSliceGuidedModel):
    """Both 3D encoders, the packers and the language model, without its output head."""

    config: HSENetConfig

    def __init__(self, config: HSENetConfig):
        super().__init__(config)
        configs = (config.vision_config, config.local_vision_config, config.slice_config)
        self.global_encoder, self.local_encoder, self.slice_encoder = (
            HSENetVisionModel(encoder) if encoder is not None else None for encoder in configs
        )
        self.multi_modal_projector = HSENetMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
        **kwargs,
    ) -> HSENetImageFeatures:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_volumes, 1, depth, height, width)`).
            slice_pixel_values (`torch.Tensor` of shape `(num_volumes, num_slices, 3, height, width)`, *optional*).
            slice_features (`torch.Tensor` of shape `(num_volumes, num_slices, slice_hidden_size)`, *optional*).
        """
        features = self.get_patch_features(pixel_values, slice_pixel_values, slice_features)
        packed = self.multi_modal_projector(features.global_patch_features, features.local_patch_features)
        return HSENetImageFeatures(pooler_output=packed, patch_scores=features.patch_scores)

    def get_patch_features(
        self,
        pixel_values: torch.Tensor,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
    ) -> HSENetPatchFeatures:
        """
        What the packers read. With frozen encoders and volumes that stay the same, it can be computed once: `forward`
        takes it in place of the volumes.

        Args:
            pixel_values, slice_pixel_values, slice_features: see [`~HSENetModel.get_image_features`].
        """
        global_states = local_states = patch_scores = None
        if self.global_encoder is not None:
            global_states = self.global_encoder(pixel_values).last_hidden_state[:, 1:]  # patches without CLS
        if self.local_encoder is not None:
            slice_features = self._slice_features(slice_pixel_values, slice_features)
            local_outputs = self.local_encoder(pixel_values, slice_features)
            local_states, patch_scores = local_outputs.last_hidden_state[:, 1:], local_outputs.patch_scores
        return HSENetPatchFeatures(global_states, local_states, patch_scores)

    def _pack_cached(
        self, global_patch_features: torch.Tensor | None, local_patch_features: torch.Tensor | None
    ) -> HSENetImageFeatures:
        for name, encoder, features in (
            ("global_patch_features", self.global_encoder, global_patch_features),
            ("local_patch_features", self.local_encoder, local_patch_features),
        ):
            expected = (encoder.config.num_patches, encoder.config.hidden_size) if encoder is not None else None
            if expected != (tuple(features.shape[1:]) if features is not None else None):
                raise ValueError(
                    f"Expected {name} {'for' if expected else 'to be None without'} the model's encoder"
                    f"{f' of shape (num_volumes, {expected[0]}, {expected[1]})' if expected else ''}, got "
                    f"{'None' if features is None else tuple(features.shape)}: take them from get_patch_features."
                )
        packed = self.multi_modal_projector(global_patch_features, local_patch_features)
        return HSENetImageFeatures(pooler_output=packed)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where the packed tokens go, `(batch, sequence_length)`; their number must be the number of placeholders."""
        if input_ids is None:
            token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_id)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens, num_features = mask.sum(), image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            num_tokens == num_features,
            f"The text has {num_tokens} image placeholders, but {image_features.shape[0]} volume(s) give "
            f"{num_features} tokens. Prepare text and volumes together with the model's processor.",
        )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
        global_patch_features: torch.Tensor | None = None,
        local_patch_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> HSENetModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        is_cached = global_patch_features is not None or local_patch_features is not None
        if is_cached and pixel_values is not None:
            raise ValueError("Pass pixel_values or cached patch features, not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # generate() encodes the volumes once, before it copies the inputs for beams, and hands them over here.
        image_outputs = mm_encoder_outputs.get("image") if mm_encoder_outputs is not None else None
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, slice_pixel_values, slice_features)
        if image_outputs is None and is_cached:
            image_outputs = self._pack_cached(global_patch_features, local_patch_features)
        if image_outputs is not None:
            image_features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        return HSENetModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **_cache_in(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features if image_outputs is not None else None,
            patch_scores=image_outputs.patch_scores if image_outputs is not None else None,
        )


class HSENetForConditionalGeneration(HSENetSliceGuidedModel, GenerationMixin):
    """Writes reports and answers questions about CT volumes."""

    config: HSENetConfig
    _auto_class = "AutoModel"
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: HSENetConfig):
        super().__init__(config)
        if config.text_config.model_type in _TEXT_MODELS_WITH_OTHER_HEADS:
            raise ValueError(
                f"text_config is a {config.text_config.model_type!r} model, whose output head is not a bias-free "
                "linear layer: choose another causal language model (Phi-3/4, Llama, Qwen, Mistral, Gemma, ...)."
            )
        self.model = HSENetModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            # The embedding is `embed_tokens` in most language models, but `wte` in GPT-2, for example.
            embeddings = self.model.language_model.get_input_embeddings()
            name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()

    @classmethod
    def _from_config(cls, config: HSENetConfig, **kwargs) -> PreTrainedModel:
        # vLLM asks `AutoModel` for the model without its head, which it brings itself.
        headless = config.text_config._attn_implementation == "vllm"
        return HSENetModel._from_config(config, **kwargs) if headless else super()._from_config(config, **kwargs)

    @property
    def slice_encoder(self) -> HSENetVisionModel | None:
        return self.model.slice_encoder

    def save_pretrained(self, *args, **kwargs) -> None:
        # `_auto_class` names one Auto class; all of these load the same model.
        auto_classes = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM")
        self.config.auto_map = dict.fromkeys(auto_classes, "modeling_hsenet.HSENetForConditionalGeneration")
        super().save_pretrained(*args, **kwargs)

    def get_image_features(self, *args, **kwargs) -> HSENetImageFeatures:
        """As [`HSENetModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_patch_features(self, *args, **kwargs) -> HSENetPatchFeatures:
        """As [`HSENetModel.get_patch_features`]."""
        return self.model.get_patch_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        slice_pixel_values: torch.Tensor | None = None,
        slice_features: torch.Tensor | None = None,
        global_patch_features: torch.Tensor | None = None,
        local_patch_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        output_patch_scores: bool = False,
        **kwargs,
    ) -> HSENetCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, sequence_length)`, *optional*):
                With `config.image_seq_length` placeholders (`config.image_token_id`) for each volume.
            attention_mask (`torch.Tensor` of shape `(batch, sequence_length)`, *optional*).
            pixel_values, slice_pixel_values, slice_features (*optional*): see [`~HSENetModel.get_image_features`].
            labels (`torch.Tensor` of shape `(batch, sequence_length)`, *optional*): -100 where there is no loss.
            global_patch_features, local_patch_features (*optional*):
                From [`~HSENetModel.get_patch_features`], instead of the volumes: the encoders don't run.
            mm_encoder_outputs (`dict`, *optional*): `{"image": get_image_features(...)}`, instead of the volumes.
            logits_to_keep (`int` or `torch.Tensor`): so many last logits, or those at these positions; 0: all.
            skip_logits (`bool`, *optional*):
                Whether the output goes without logits. The loss needs them only where there are labels, and a prompt's
                would take most of the memory. By default true while training with labels.
            output_patch_scores (`bool`): whether to return the slices' weights on the patch grid.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            slice_pixel_values=slice_pixel_values,
            slice_features=slice_features,
            global_patch_features=global_patch_features,
            local_patch_features=local_patch_features,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        loss = logits = None
        if labels is not None:
            loss = self._answer_loss(outputs.last_hidden_state, labels, **kwargs)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0 keeps all
            logits = self._logits(outputs.last_hidden_state[:, kept])
        return HSENetCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **_cache_in(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            patch_scores=outputs.patch_scores if output_patch_scores else None,
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _scale_logits(self.lm_head(hidden_states), self.config.text_config)

    def _answer_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """Only positions whose next token has a label meet the vocabulary: `(num_labels, vocab_size)` logits."""
        targets = labels[:, 1:].to(hidden_states.device)
        has_label = targets != -100
        logits = self._logits(hidden_states[:, :-1][has_label])
        return self.loss_function(
            logits=logits, labels=None, shift_labels=targets[has_label], vocab_size=logits.shape[-1], **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> dict:
        # Both names stand in the signature: generate() refuses what it finds neither here nor in forward's.
        kwargs.update(_cache_in({"cache": cache, "past_key_values": past_key_values}))
        mask = kwargs.get("attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and mask.ndim == 2 and (mask[:, -1] == 0).any():
            raise ValueError(
                "Expected prompts padded on the left, got padding on the right: the answer would follow the padding. "
                "Prepare the batch with the model's processor."
            )
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        volumes = [value for name in _VOLUME_INPUTS if (value := kwargs.get(name)) is not None and len(value)]
        if kwargs.get("is_first_iteration") and not volumes:
            new_ids = model_inputs.get("input_ids")  # without what a cache already holds
            if new_ids is not None and (new_ids == self.config.image_token_id).any():
                raise ValueError(
                    "The text has placeholders of a volume, but no volume was given: the answer would be made up. "
                    "Prepare both with the model's processor; of the pipelines use image-text-to-text."
                )
        # Once the prompt is in the cache the volumes are too; without a cache every step reads them again.
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in _VOLUME_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs


_ENCODED = ("global_patch_features", "local_patch_features", "mm_encoder_outputs")
_VOLUME_INPUTS = ("pixel_values", "slice_pixel_values", "slice_features", *_ENCODED)

# Families whose language-model head cannot be rebuilt from `AutoModel` and one bias-free linear layer.
_TEXT_MODELS_WITH_OTHER_HEADS = ("phi", "codegen", "gptj")


def _scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """The last step of Cohere's, Granite's and Gemma's heads, which `AutoModel` leaves out."""
    if getattr(text_config, "logit_scale", None) is not None:
        logits = logits * text_config.logit_scale
    if getattr(text_config, "logits_scaling", None) is not None:
        logits = logits / text_config.logits_scaling
    if getattr(text_config, "final_logit_softcapping", None) is not None:
        logits = torch.tanh(logits / text_config.final_logit_softcapping) * text_config.final_logit_softcapping
    return logits


__all__ = ["HSENetCLIPModel", "HSENetForConditionalGeneration", "HSENetModel", "HSENetVisionModel"]
