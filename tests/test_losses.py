"""The losses against plain NumPy formulas, and one process against two, by their gradients."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from hsenet.losses import global_similarity, image_text_contrastive_loss, semantic_consistency_loss


def embeddings(rows: int = 8, width: int = 5) -> list[torch.Tensor]:
    """Images, texts, anchor images, anchor texts."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(4)
    ]


def both_losses(images, texts, anchor_images, anchor_texts, scale) -> torch.Tensor:
    similarity = global_similarity(images, texts)
    anchor = global_similarity(anchor_images, anchor_texts)
    consistency = semantic_consistency_loss(similarity, anchor, scale)
    return image_text_contrastive_loss(similarity, scale) + 0.1 * consistency


def test_contrastive_loss_is_info_nce_in_both_directions():
    images, texts, *_ = embeddings()
    logits = 7.0 * images.numpy() @ texts.numpy().T
    by_image = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    by_text = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss = image_text_contrastive_loss(global_similarity(images, texts), torch.tensor(7.0))
    assert loss.item() == pytest.approx((by_image.mean() + by_text.mean()) / 2, abs=1e-12)


def test_consistency_loss_is_the_squared_difference_of_logits():
    images, texts, anchor_images, anchor_texts = embeddings()
    difference = 7.0 * (images @ texts.t() - anchor_images @ anchor_texts.t())
    similarity, anchor = global_similarity(images, texts), global_similarity(anchor_images, anchor_texts)
    loss = semantic_consistency_loss(similarity, anchor, torch.tensor(7.0))
    assert loss.item() == pytest.approx((difference**2).mean().item(), abs=1e-12)
    assert semantic_consistency_loss(anchor, anchor, torch.tensor(7.0)) == 0


def test_consistency_loss_gives_no_gradient_to_anchor_and_temperature():
    parts = [part.requires_grad_() for part in embeddings()]
    scale = torch.tensor(7.0, requires_grad=True)
    similarity, anchor = global_similarity(*parts[:2]), global_similarity(*parts[2:])
    semantic_consistency_loss(similarity, anchor, scale).backward()
    assert parts[0].grad.abs().sum() > 0 and parts[1].grad.abs().sum() > 0
    assert parts[2].grad is None and parts[3].grad is None and scale.grad is None


def one_rank(rank: int, world_size: int, port: int, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    parts = [part.chunk(world_size)[rank].clone() for part in embeddings()]
    images, texts = (part.requires_grad_() for part in parts[:2])
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = both_losses(images, texts, *parts[2:], scale)
    loss.backward()
    results[rank] = [tensor.detach().numpy() for tensor in (loss, images.grad, texts.grad, scale.grad)]
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one():
    parts = embeddings()
    images, texts = (part.requires_grad_() for part in parts[:2])
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = both_losses(images, texts, *parts[2:], scale)
    loss.backward()
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(one_rank, (2, 29611, results), nprocs=2)
        ranks = [results[0], results[1]]
    # DDP averages over processes: embeddings of a rank only exist there, so their gradients are halved.
    assert np.mean([rank[0] for rank in ranks]) == pytest.approx(loss.item(), abs=1e-12)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in ranks]) / 2, images.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(np.concatenate([rank[2] for rank in ranks]) / 2, texts.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(np.mean([rank[3] for rank in ranks]), scale.grad.numpy(), atol=1e-12)
