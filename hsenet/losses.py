"""The contrastive loss over all processes and the semantic-consistency loss of stage 2.

Both take one process's embeddings and look at the global batch. Each process takes the cross-entropy (or squared
error) of its own rows only; averaged over processes, as DDP does with gradients, that is the loss of the global batch.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hsenet.distributed import first_row, gather_with_gradient


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


def image_text_contrastive_loss(similarity: GlobalSimilarity, logit_scale: torch.Tensor) -> torch.Tensor:
    """
    InfoNCE in both directions (paper section 3.1): row i of one side belongs to row i of the other.

    Args:
        similarity ([`GlobalSimilarity`]): cosines.
        logit_scale (`torch.Tensor` of shape `()`): the temperature itself, `model.logit_scale.exp()`.
    """
    batch = similarity.image_to_text.shape[0]
    labels = torch.arange(batch, device=logit_scale.device) + first_row(batch)
    image_loss = nn.functional.cross_entropy(logit_scale * similarity.image_to_text, labels)
    text_loss = nn.functional.cross_entropy(logit_scale * similarity.text_to_image, labels)
    return (image_loss + text_loss) / 2


def semantic_consistency_loss(
    similarity: GlobalSimilarity, anchor: GlobalSimilarity, logit_scale: torch.Tensor
) -> torch.Tensor:
    """
    Keeps stage 2's similarity matrix near the frozen stage-1 one (paper section 3.2, L_SA).

    Mean squared difference of the two logit matrices, each scaled by stage 2's temperature, which gets no gradient
    from it: shrinking the temperature would otherwise be the easiest way to shrink the loss.
    """
    scale = logit_scale.detach()
    image_loss = nn.functional.mse_loss(scale * similarity.image_to_text, scale * anchor.image_to_text.detach())
    text_loss = nn.functional.mse_loss(scale * similarity.text_to_image, scale * anchor.text_to_image.detach())
    return (image_loss + text_loss) / 2
