"""The objective of stages 1 and 2 as the training loop calls it: model and batch to the loss of the global batch."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator

from hsenet.distributed import average_gradient
from hsenet.frozen_features import CachedEmbeddings, ComputedEmbeddings
from hsenet.gradient_cache import embed_with_cached_gradients
from hsenet.losses import (
    GlobalSimilarity,
    Schedule,
    SiblingsMode,
    consistency_weight,
    global_similarity,
    image_text_contrastive_loss,
    semantic_consistency_loss,
    sibling_pairs,
)


@dataclass
class ContrastiveArguments:
    siblings: SiblingsMode = field(
        default="masked",
        metadata={
            "help": "Other rows of a row's study or with its report: left out of its negatives, further positives, or "
            "(paper) negatives."
        },
    )
    chunk_size: int = field(
        default=0, metadata={"help": "Rows in memory at once, by gradient caching; 0: the process's whole batch."}
    )
    max_logit_scale: float = field(default=4.6052, metadata={"help": "The log temperature stays below: ln 100."})


@dataclass
class ConsistencyArguments:
    consistency_weight: float = field(default=0.1, metadata={"help": "lambda_s of the paper; 0: no anchor."})
    consistency_schedule: Schedule = field(
        default="constant",
        metadata={
            "help": "The weight over the steps: the paper's, the released code's, which ends at 0, or a cosine."
        },
    )
    consistency_decay_steps: int = field(
        default=5000,
        metadata={"help": "With linear_decay and cosine: optimiser steps after which there is no anchor any more."},
    )
    consistency_scale: Literal["teacher", "student"] = field(
        default="teacher",
        metadata={"help": "Whose temperature scales the anchor's logits: its own, or (released) stage 2's."},
    )
    consistency_scale_gradient: bool = field(
        default=False, metadata={"help": "Whether stage 2's temperature learns from the anchor too (released: yes)."}
    )
    anchor_embeddings: Literal["auto", "cached", "computed"] = field(
        default="auto",
        metadata={
            "help": "Of stage 1: looked up, or computed in every step from what stage 2 sees. auto: computed if "
            "augmentation changes that. cached beside max_shift or rewrite_reports is an approximation: those of the "
            "volume and the report as they were."
        },
    )

    def looks_up_anchor(self, *, is_changed: bool) -> bool:
        """Whether stage 1's embeddings are computed once, where augmentation `is_changed` what stage 2 sees or not."""
        return self.anchor_embeddings == "cached" or (self.anchor_embeddings == "auto" and not is_changed)


@dataclass
class Anchor:
    """
    The frozen stage 1, and how it holds stage 2.

    Args:
        embeddings ([`CachedEmbeddings`] or [`ComputedEmbeddings`]): of the training rows, by stage 1.
        logit_scale (`torch.Tensor` of shape `()`): its temperature itself.
    """

    embeddings: CachedEmbeddings | ComputedEmbeddings
    logit_scale: torch.Tensor
    arguments: ConsistencyArguments

    def loss(self, similarity: GlobalSimilarity, index: torch.Tensor, inputs: dict, scale: torch.Tensor):
        """Of the rows `index` with these inputs, whose cosines in stage 2 are `similarity`, at its temperature."""
        return semantic_consistency_loss(
            similarity,
            global_similarity(*(side.to(scale.device) for side in self.embeddings(index, inputs))),
            scale,
            self.logit_scale if self.arguments.consistency_scale == "teacher" else None,
            scale_gradient=self.arguments.consistency_scale_gradient,
        )

    def weight(self, step: int) -> float:
        chosen = self.arguments
        return consistency_weight(
            step, chosen.consistency_weight, chosen.consistency_schedule, chosen.consistency_decay_steps
        )


class ContrastiveObjective:
    """
    Stage 1's loss, and stage 2's with an anchor: `(model, batch, step)` to the loss and values to log.

    A batch is what [`ContrastiveCollator`] makes of training rows, with `index` and `sibling_ids`.
    """

    def __init__(self, accelerator: Accelerator, arguments: ContrastiveArguments, anchor: Anchor | None = None):
        self.accelerator = accelerator
        self.arguments = arguments
        self.anchor = anchor

    def __call__(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = dict(batch)
        index, siblings = inputs.pop("index"), sibling_pairs(inputs.pop("sibling_ids"))
        log_scale = self.accelerator.unwrap_model(model).logit_scale
        with torch.no_grad():
            log_scale.clamp_(max=self.arguments.max_logit_scale)
        scale = average_gradient(log_scale).exp()
        values = {"logit_scale": scale.item()}

        def loss_of(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
            similarity = global_similarity(image_embeds, text_embeds)
            loss = image_text_contrastive_loss(similarity, scale, siblings, self.arguments.siblings)
            if self.anchor is None:
                return loss
            values["consistency_weight"] = weight = self.anchor.weight(step)
            if weight == 0:  # the schedule has let go
                return loss
            consistency = self.anchor.loss(similarity, index, inputs, scale)
            values["consistency"] = consistency.item()
            return loss + weight * consistency

        loss = embed_with_cached_gradients(self.accelerator, model, inputs, self.arguments.chunk_size, loss_of)
        return loss, values
