"""Gathering embeddings from all processes, with gradients, and what else all processes have to agree on."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


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


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()  # the incoming one belongs to autograd
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def average_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """
    The tensor itself, whose gradient is the mean over processes whoever wraps the model.

    For a parameter that the loss uses outside of the model's forward pass, such as the temperature: FSDP2 cannot shard
    a scalar, so nobody averages it there. DDP averages once more, which changes nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _AverageGradient.apply(tensor)


@contextmanager
def no_gradient_sync(model: torch.nn.Module, sync_after: bool) -> Iterator[None]:
    """
    Backward passes inside only add to this process's gradients, whether DDP or FSDP2 wraps the model, or nothing.

    `accelerator.no_sync` does nothing for DDP in a single process, and makes FSDP2 synchronise ever after.

    Args:
        sync_after (`bool`): whether FSDP2's next backward pass ends an optimiser step, `accelerator.sync_gradients`.
    """
    if not isinstance(model, FSDPModule):
        with getattr(model, "no_sync", nullcontext)():
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(sync_after)
