"""A contrastive batch that memory does not bound: GradCache (Gao et al. 2021, arXiv 2101.06983).

The loss needs all embeddings at once, but an encoder's activations are needed only while its own gradient is computed.
So a batch is embedded in chunks without a graph, the loss on all embeddings says what gradient each of them gets, and
the chunks are run again, one at a time with a graph, to carry that gradient into the weights. The price is a second
forward pass; loss and gradients are those of the whole batch, to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import get_device_states, set_device_states

from hsenet.distributed import no_gradient_sync


def embed_with_cached_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    chunk_size: int,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    The loss of this process's batch; its `accelerator.backward` completes the gradients of all chunks.

    All chunks but the last have had their backward pass when this returns, without synchronisation between processes:
    call it once for each backward pass, and inside `accelerator.accumulate` where gradients accumulate.

    Args:
        model: prepared by `accelerator`; gives `image_embeds` and `text_embeds`, both `(batch, projection_dim)`.
        inputs: of `model`; the first axis of all is the batch.
        chunk_size (`int`): rows that are in memory with their activations at once; 0: all, without a cache.
        loss_of: image and text embeddings of the whole batch to the loss. It may use other processes' embeddings and
            parameters that train; these get their gradient too.
    """
    batch = len(next(iter(inputs.values())))
    if chunk_size <= 0 or chunk_size >= batch:
        return loss_of(*_embed(model, inputs))
    split = {name: tensor.split(chunk_size) for name, tensor in inputs.items()}
    chunks = [dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True)]
    random_states, embeds = [], []
    for chunk in chunks:
        random_states.append(_RandomState(chunk))
        with torch.no_grad():
            embeds.append(_embed(model, chunk))
    leaves = [torch.cat(side).requires_grad_() for side in zip(*embeds, strict=True)]
    loss = loss_of(*leaves)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    of_chunks = zip(*(gradient.split(chunk_size) for gradient in gradients), strict=True)
    for number, (chunk, state, wanted) in enumerate(zip(chunks, random_states, of_chunks, strict=True), start=1):
        is_last = number == len(chunks)
        with nullcontext() if is_last else no_gradient_sync(model, accelerator.sync_gradients):
            with state.restored():
                embeds = _embed(model, chunk)
            # Its gradient for the embeddings is the cached one.
            stand_in = sum((side * gradient).sum() for side, gradient in zip(embeds, wanted, strict=True))
            if not is_last:
                accelerator.backward(stand_in)
    return loss + (stand_in - stand_in.detach())


def _embed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


class _RandomState:
    """Of the CPU and of the device that holds the inputs: both passes must drop the same units and patches."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        tensor = next(iter(inputs.values()))
        self.device_type = tensor.device.type
        self.cpu = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Random numbers as they were then; afterwards they go on as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield
