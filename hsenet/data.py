"""Dataset rows to examples: one report with its volume, or one question with its volume and answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

from hsenet.volume_cache import VolumeCache


# The instruction that asks for a report. The first is also used for inference, as in the paper's evaluation.
REPORT_PROMPTS = (
    "Can you summarize with findings the images presented?",
    "Write the report of this CT scan.",
    "What does this chest CT show?",
    "Describe the findings of this examination.",
)


def load_rows(dataset: str, name: str, split: str, max_rows: int | None = None) -> list[dict[str, Any]]:
    """
    Rows of one configuration ("reports", "vqa") of a local dataset folder or a Hub dataset.

    A column `volume` with paths relative to a local folder is made absolute; a column of the `Nifti` feature already
    holds images.
    """
    rows: Dataset = load_dataset(dataset, name, split=split)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    root = Path(dataset)
    return [
        {**row, "volume": str(root / row["volume"])} if isinstance(row["volume"], str) and root.is_dir() else row
        for row in rows
    ]


def report_text(row: dict[str, Any], fields: tuple[str, ...] = ("findings", "impression")) -> str:
    """The row's report: its fields, each under its heading, in the usual order."""
    return " ".join(f"{field.capitalize()}: {row[field].strip()}" for field in fields if row[field])


def generation_rows(
    reports: list[dict[str, Any]], questions: list[dict[str, Any]], fields: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Report and question rows as `volume_name`, `question` and `answer`; reports take the prompts in turn."""
    as_reports = [
        {
            "volume_name": row["volume_name"],
            "question": REPORT_PROMPTS[index % len(REPORT_PROMPTS)],
            "answer": report_text(row, fields),
        }
        for index, row in enumerate(reports)
    ]
    as_questions = [{name: row[name] for name in ("volume_name", "question", "answer")} for row in questions]
    return as_reports + as_questions


class VolumeRows(torch.utils.data.Dataset):
    """Rows joined with their cached tensors: `{**row, "pixel_values": ..., "slice_features": ...}`."""

    def __init__(self, rows: list[dict[str, Any]], cache: VolumeCache, *, with_slices: bool = True):
        self.rows = rows
        self.cache = cache
        self.with_slices = with_slices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        tensors = self.cache[row["volume_name"]]
        if not self.with_slices:
            tensors.pop("slice_features", None)
        return {**row, **tensors, "index": index}


class SimilarLengthSampler(torch.utils.data.Sampler):
    """
    Every row once an epoch, rows of similar length together: a batch of short answers is not padded to a report.

    Rows are shuffled, cut into chunks of many batches, sorted by length within a chunk, and the batches shuffled. The
    order follows from seed and epoch alone, so a resumed run sees the rows of the undisturbed one.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, batches_per_chunk: int = 50):
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.chunk = batch_size * batches_per_chunk
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        chunks = [chunk[self.lengths[chunk].argsort(descending=True)] for chunk in order.split(self.chunk)]
        batches = list(torch.cat(chunks).split(self.batch_size))
        # A short last batch stays last: in the middle it would shift all batches after it.
        short = batches.pop() if len(batches[-1]) < self.batch_size else torch.empty(0, dtype=torch.long)
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        yield from torch.cat([*shuffled, short]).tolist()
