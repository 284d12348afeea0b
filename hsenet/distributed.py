"""Gathering embeddings from all processes, with gradients."""

import torch
import torch.distributed as dist


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # Every rank's loss depends on every rank's rows: sum what all ranks say about ours.
        gradient = gradient.clone()  # the incoming one belongs to autograd
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """
    The rows of all processes in the order of their ranks: `(batch, ...)` to `(world_size * batch, ...)`.

    Every process must have the same number of rows. `accelerator.gather` would cut the gradient.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _GatherWithGradient.apply(tensor)


def first_row(batch: int) -> int:
    """Index of this process's first row among the gathered rows."""
    return dist.get_rank() * batch if dist.is_initialized() else 0
