"""The contrastive loss over all processes and the semantic-consistency loss of stage 2.

Both take one process's embeddings and look at the global batch. Each process takes the cross-entropy (or squared
error) of its own rows only; averaged over processes, as DDP does with gradients, that is the loss of the global batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hsenet.distributed import first_row, gather_with_gradient


# What other rows of the same study or with the same report are to a row of a contrastive batch.
SiblingsMode = Literal["masked", "multi_positive", "none"]
Schedule = Literal["constant", "linear_decay", "cosine"]


@dataclass
class GlobalSimilarity:
    """Cosines of this process's rows with all columns.

    Args:
        image_to_text (`torch.Tensor` of shape `(batch, global_batch)`).
        text_to_image (`torch.Tensor` of shape `(batch, global_batch)`).
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor


def global_similarity(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> GlobalSimilarity:
    """From L2-normalised embeddings `(batch, projection_dim)` of one process."""
    all_images, all_texts = gather_with_gradient(image_embeds), gather_with_gradient(text_embeds)
    return GlobalSimilarity(image_embeds @ all_texts.t(), text_embeds @ all_images.t())


def sibling_pairs(sibling_ids: torch.Tensor) -> torch.Tensor:
    """
    Which columns of the global batch are siblings of this process's rows: other rows that share one of their ids.

    Args:
        sibling_ids (`torch.Tensor` of shape `(batch, num_ids)`): numbers of the row's study and of its report.

    Returns:
        `torch.Tensor` of shape `(batch, global_batch)`, boolean: false for the row itself.
    """
    return pairs_among(sibling_ids, gather_with_gradient(sibling_ids), first_row(len(sibling_ids)))


def pairs_among(sibling_ids: torch.Tensor, all_ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The same without other processes: siblings of rows among `all_ids`, whose row `first` is the first of them."""
    pairs = (sibling_ids.unsqueeze(1) == all_ids.unsqueeze(0)).any(dim=-1)
    rows = torch.arange(len(pairs), device=pairs.device)
    pairs[rows, rows + first] = False
    return pairs


def image_text_contrastive_loss(
    similarity: GlobalSimilarity,
    logit_scale: torch.Tensor,
    siblings: torch.Tensor | None = None,
    mode: SiblingsMode = "none",
) -> torch.Tensor:
    """
    InfoNCE in both directions (paper section 3.1): row i of one side belongs to row i of the other.

    Siblings, such as two reconstructions of one scan with one report, belong to each other as well, and as each
    other's negatives they would be pushed apart.

    Args:
        similarity ([`GlobalSimilarity`]): cosines.
        logit_scale (`torch.Tensor` of shape `()`): the temperature itself, `model.logit_scale.exp()`.
        siblings (`torch.Tensor` of shape `(batch, global_batch)`, *optional*): see [`sibling_pairs`].
        mode (`"masked"`, `"multi_positive"` or `"none"`):
            Siblings are left out of the row's softmax; or share its target with the row's own column, evenly; or are
            negatives like all others, as published.
    """
    batch, global_batch = similarity.image_to_text.shape
    labels = torch.arange(batch, device=logit_scale.device) + first_row(batch)
    logits = [logit_scale * similarity.image_to_text, logit_scale * similarity.text_to_image]
    if mode != "none" and siblings is None:
        raise ValueError(f"siblings={mode!r} needs to know which rows are siblings, got None.")
    if mode == "masked":
        logits = [side.masked_fill(siblings, float("-inf")) for side in logits]
    elif mode == "multi_positive":
        positives = siblings.to(logits[0].dtype) + nn.functional.one_hot(labels, global_batch)
        labels = positives / positives.sum(dim=1, keepdim=True)
    image_loss, text_loss = (nn.functional.cross_entropy(side, labels) for side in logits)
    return (image_loss + text_loss) / 2


def semantic_consistency_loss(
    similarity: GlobalSimilarity,
    anchor: GlobalSimilarity,
    logit_scale: torch.Tensor,
    anchor_scale: torch.Tensor | None = None,
    *,
    scale_gradient: bool = False,
) -> torch.Tensor:
    """
    Keeps stage 2's similarity matrix near the frozen stage-1 one (paper section 3.2, L_SA).

    Mean squared difference of the two logit matrices, averaged over both directions. The anchor gets no gradient.
    Siblings count like all other pairs: no pair is called wrong here, and how near stage 1 puts two siblings is as
    good a target as any other of its similarities.

    Args:
        similarity ([`GlobalSimilarity`]): cosines of stage 2.
        anchor ([`GlobalSimilarity`]): cosines of stage 1, for the same rows.
        logit_scale (`torch.Tensor` of shape `()`): stage 2's temperature, `model.logit_scale.exp()`.
        anchor_scale (`torch.Tensor` of shape `()`, *optional*):
            Stage 1's own temperature. `None`, as the released weights were trained: stage 2's scales both matrices.
        scale_gradient (`bool`):
            Whether stage 2's temperature learns from this loss, through its own logits only (released weights). With
            one temperature for both matrices its easiest way is to shrink.
    """
    anchor_scale = (logit_scale if anchor_scale is None else anchor_scale).detach()
    scale = logit_scale if scale_gradient else logit_scale.detach()
    image_loss = nn.functional.mse_loss(scale * similarity.image_to_text, anchor_scale * anchor.image_to_text.detach())
    text_loss = nn.functional.mse_loss(scale * similarity.text_to_image, anchor_scale * anchor.text_to_image.detach())
    return (image_loss + text_loss) / 2


def consistency_weight(step: int, weight: float, schedule: Schedule, decay_steps: int) -> float:
    """
    What the consistency loss is multiplied with at an optimiser step, counted from 0.

    Args:
        step (`int`): optimiser steps done so far.
        weight (`float`): lambda_s of the paper.
        schedule (`"constant"`, `"linear_decay"` or `"cosine"`):
            `weight` at every step, as in the paper; or `weight` at step 0 and less to 0 at `decay_steps` and ever
            after: evenly, as in the code behind the released weights, or along half a cosine, slowly at both ends.
        decay_steps (`int`): only for the two that decay.
    """
    if schedule == "constant":
        return weight
    if decay_steps < 1:
        raise ValueError(f"decay_steps should be at least 1, got {decay_steps}; consistency_weight=0 has no anchor.")
    done = min(step / decay_steps, 1.0)
    return weight * (1 - done if schedule == "linear_decay" else (1 + math.cos(math.pi * done)) / 2)
