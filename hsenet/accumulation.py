"""The micro-batches of an optimiser step, where their losses are means over unlike numbers of tokens."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from accelerate import Accelerator


def with_num_items(batches: Iterable[dict], accelerator: Accelerator) -> Iterator[dict]:
    """
    Batches of tokens with `labels` get `num_items_in_batch`, by which transformers' models divide their summed loss.

    It makes the step's gradient that of the mean over all tokens with a label, in all accumulated batches of all
    processes: with a mean of means, a token of a short answer would weigh more than one of a report. The micro-batches
    of a step are read ahead to count. As accumulation and processes will average, it is an average too.
    """
    accumulation, batches = accelerator.gradient_accumulation_steps, iter(batches)
    while step := list(islice(batches, accumulation)):
        if {"input_ids", "labels"} <= step[0].keys():
            num_items = accelerator.reduce(sum(_num_targets(batch["labels"]) for batch in step), "mean") / len(step)
            step = [{**batch, "num_items_in_batch": num_items} for batch in step]
        yield from step


def _num_targets(labels: torch.Tensor) -> torch.Tensor:
    """A token is predicted from those before it, so a row's first label counts for nothing."""
    return (labels[:, 1:] != -100).sum().float()
