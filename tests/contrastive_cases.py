"""One global batch with siblings, its loss in plain torch, and what processes of any number make of it."""

from functools import cache
from itertools import product

import tiny
import torch
from accelerate import Accelerator
from torch import nn

from hsenet.contrastive import Anchor, ConsistencyArguments, ContrastiveArguments, ContrastiveObjective
from hsenet.data import add_report_texts
from hsenet.frozen_features import CachedEmbeddings
from modeling_hsenet import HSENetCLIPModel


MODES, DTYPES, STAGES = ("none", "masked", "multi_positive"), (torch.float32, torch.float64), ("none", "slices")
ROWS = 8
# Two scans of a study have reports of their own; a report is another study's; row 6 belongs to 4 and 1, which do not
# belong to each other. Siblings are in one process, or not, whatever the number of processes.
STUDIES = ["a", "b", "c", "a", "d", "e", "d", "e"]
REPORTS = [0, 1, 2, 3, 4, 0, 1, 4]
SIBLINGS = {frozenset(pair) for pair in ((0, 3), (0, 5), (1, 6), (4, 6), (4, 7), (5, 7))}
ANCHOR = ConsistencyArguments(0.5, "linear_decay", 10, "student", True)
STEP = 4  # of ten: the anchor weighs 0.3


def model(stage: str, dtype: torch.dtype) -> HSENetCLIPModel:
    clip = tiny.clip_model(stage, logit_scale_init_value=1.0).to(dtype)
    if clip.slice_encoder is not None:
        clip.slice_encoder.requires_grad_(False)
    return clip


@cache
def batch(stage: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"study_id": study, "findings": tiny.SENTENCES[report]} for study, report in zip(STUDIES, REPORTS, strict=True)
    ]
    add_report_texts(rows, ("findings",))
    tokens = tiny.tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs = {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "pixel_values": torch.rand(ROWS, 1, *tiny.IMAGE_SIZE, generator=generator, dtype=dtype),
        "index": torch.arange(ROWS),
        "sibling_ids": torch.tensor([row["sibling_ids"] for row in rows]),
    }
    if stage == "slices":
        size = (ROWS, tiny.NUM_SLICES, tiny.SLICES["hidden_size"])
        inputs["slice_features"] = torch.randn(size, generator=generator, dtype=dtype)
    return inputs


@cache
def anchor_embeds(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [nn.functional.normalize(torch.randn(ROWS, 16, generator=generator, dtype=dtype)) for _ in range(2)]


def anchor(stage: str, dtype: torch.dtype) -> Anchor | None:
    if stage != "slices":
        return None
    return Anchor(CachedEmbeddings(*anchor_embeds(dtype)), torch.tensor(2.0, dtype=dtype), ANCHOR)


def plain_loss(clip: HSENetCLIPModel, stage: str, mode: str, inputs: dict, rows: range) -> torch.Tensor:
    """The loss of these rows as one batch, from its formula, row by row."""
    chosen = {name: tensor[list(rows)] for name, tensor in inputs.items() if name not in ("index", "sibling_ids")}
    outputs, scale = clip(**chosen), clip.logit_scale.exp()
    logits = scale * outputs.image_embeds @ outputs.text_embeds.T
    terms = []
    for matrix, own in product((logits, logits.T), range(len(rows))):
        others = [column for column in range(len(rows)) if frozenset((rows[own], rows[column])) in SIBLINGS]
        seen = [column for column in range(len(rows)) if mode != "masked" or column not in others]
        right = [own, *others] if mode == "multi_positive" else [own]
        terms.append(matrix[own, seen].logsumexp(0) - matrix[own, right].mean())
    loss = torch.stack(terms).mean()
    if stage == "slices":
        images, texts = (side[list(rows)] for side in anchor_embeds(logits.dtype))
        loss = loss + 0.3 * ((logits - scale.detach() * images @ texts.T) ** 2).mean()
    return loss


def gradients(clip: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.requires_grad}


def run_case(accelerator: Accelerator, stage, mode, dtype, chunk_size, accumulation) -> tuple[float, dict]:
    """Loss and gradients of one process, its rows cut from the global batches of the accumulated steps."""
    clip = accelerator.prepare(model(stage, dtype))
    objective = ContrastiveObjective(accelerator, ContrastiveArguments(mode, chunk_size), anchor(stage, dtype))
    accelerator.gradient_accumulation_steps, accelerator.step = accumulation, 0
    total = 0.0
    for micro_batch in range(accumulation):
        start, length = micro_batch * ROWS // accumulation, ROWS // accumulation // accelerator.num_processes
        start += accelerator.process_index * length
        mine = {name: tensor[start : start + length] for name, tensor in batch(stage, dtype).items()}
        with accelerator.accumulate(clip):
            loss, _ = objective(clip, mine, STEP)
            accelerator.backward(loss)
        total += accelerator.reduce(loss.detach(), "mean").item() / accumulation
    return total, gradients(accelerator.unwrap_model(clip))


def run_cases(accelerator: Accelerator, cases: list[tuple]) -> dict:
    return {case: run_case(accelerator, *case) for case in cases}
