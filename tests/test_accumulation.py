"""Stage 3's loss over accumulated batches and processes: every answer token counts the same."""

import json

import processes
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from hsenet.accumulation import with_num_items
from hsenet.collators import ReportCollator
from hsenet.training import TrainingArguments, start, train


# One row each: answers from one token to many.
TURNS = [
    [("Is there a pericardial effusion?", "no")],
    [("Write the report.", tiny.SENTENCES[1] + " " + tiny.SENTENCES[4])],
    [("Is the heart enlarged?", "yes")],
    [("Is there a nodule?", tiny.SENTENCES[1])],
]


def model() -> nn.Module:
    return tiny.generation_model().double()


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    slices = (tiny.NUM_SLICES, tiny.SLICES["hidden_size"])
    examples = [
        {
            "turns": turns,
            "pixel_values": torch.rand(1, *tiny.IMAGE_SIZE, generator=generator, dtype=torch.float64),
            "slice_features": torch.randn(slices, generator=generator, dtype=torch.float64),
        }
        for turns in TURNS
    ]
    collator = ReportCollator(tiny.processor(model()), max_length=120)
    return [collator([example]) for example in examples]


def token_losses(language: nn.Module, batch: dict) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    logits = language(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1]
    return -logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100].unsqueeze(1)).flatten()


def step(accelerator: Accelerator) -> tuple[float, dict[str, torch.Tensor]]:
    """Two accumulated batches in each of two processes, of one row each."""
    language = model()
    language.model.slice_encoder.requires_grad_(False)
    prepared = accelerator.prepare(language)
    accelerator.gradient_accumulation_steps = 2
    mine, total = rows()[accelerator.process_index :: 2], 0.0
    for batch in with_num_items(mine, accelerator):
        with accelerator.accumulate(prepared):
            loss = prepared(**batch).loss
            accelerator.backward(loss)
        total += accelerator.reduce(loss.detach(), "mean").item() / 2
    return total, {name: p.grad for name, p in language.named_parameters() if p.grad is not None}


def test_a_token_counts_the_same_in_every_row_batch_and_process(tmp_path):
    language, batches = model(), rows()
    losses = [token_losses(language, batch) for batch in batches]
    assert len({len(row) for row in losses}) == 3
    expected = torch.cat(losses).mean()
    expected.backward()
    # What a mean over rows would be is far away.
    assert abs(torch.stack([row.mean() for row in losses]).mean() - expected) > 1e-3
    for loss, gradients in processes.run(step, 2, 29646, tmp_path):
        assert loss == pytest.approx(expected.item(), abs=1e-6)  # transformers' loss is in float32
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, language.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


class _Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.words(input_ids)


def test_a_step_has_its_batches_also_at_the_end_of_an_epoch(tmp_path):
    """Reading ahead reaches the loader's end before the last step's first batch has been used."""
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=2, gradient_accumulation_steps=2, logging_steps=1)
    accelerator, seen = start(arguments), []
    ids = torch.arange(8).reshape(4, 2)  # the second of each is a target
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=1)

    def compute_loss(model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict]:
        seen.append((step, batch["num_items_in_batch"].item()))
        logits = model(batch["input_ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * len(seen), {}

    train(accelerator, _Words(), loader, compute_loss, lambda model: {}, arguments)
    assert seen == [(step, 1) for step in (0, 0, 1, 1, 2, 2, 3, 3)]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert len(losses) == 4 and losses[0] < losses[3]  # means over a step's batches, the factor grows
