"""Dataset rows to examples: one report with its volume, or one question with its volume and answer."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from hsenet.augmentation import VolumeAugmentation
from hsenet.folder_or_hub import dataset_revision
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.volume_cache import VolumeCache


def load_rows(
    dataset: str, name: str, split: str, max_rows: int | None = None, question_types: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """
    Rows of one configuration ("reports", "vqa") of a local dataset folder or a Hub dataset.

    Each knows its number `row` and its split `from_split`.
    No scan is read: `volume`, a path relative to the dataset, becomes one that [`read_scan`] takes, on the Hub too,
    where scans are fetched one by one. Questions without `volume` get it from the report of the same volume. A column
    of the `Nifti` feature would be held in memory; the build scripts keep scans in a configuration of their own.

    Args:
        max_rows (`int`, *optional*): use only the first.
        question_types: only questions of these types; empty: all.

    Raises:
        ValueError: there is no such folder, and no dataset on the Hub that can be reached.
    """
    root, revision = dataset_root(dataset)
    # Streamed: the cache that `datasets` keeps of a local folder can hold another folder's rows of the same name.
    rows = load_dataset(dataset, name, split=split, streaming=True, revision=revision)
    if question_types:
        rows = rows.filter(lambda row: row["question_type"] in question_types)
    numbered = [{**row, "row": number, "from_split": split} for number, row in enumerate(islice(rows, max_rows))]
    if numbered and "volume" not in numbered[0]:
        scans = {row["volume_name"]: _scan_columns(row) for row in load_rows(dataset, "reports", split)}
        return [{**row, **scans[row["volume_name"]]} for row in numbered]
    if numbered and isinstance(numbered[0]["volume"], str):
        numbered = [{**row, "volume": f"{root}/{row['volume']}"} for row in numbered]
    return numbered


def dataset_root(dataset: str) -> tuple[str, str | None]:
    """Where the paths of a dataset start, and its revision: its rows and its scans have to be of the same one."""
    if Path(dataset).is_dir():
        return str(Path(dataset)), None
    revision = dataset_revision(dataset)
    return f"hf://datasets/{dataset}@{revision}", revision


def _scan_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("volume", "hu_slope", "hu_intercept") if name in row}


def one_per_study(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first reconstruction of each study: siblings share a report, so each would be the other's wrong answer."""
    return list({row["study_id"]: row for row in reversed(rows)}.values())[::-1]


def add_report_texts(rows: list[dict[str, Any]], fields: tuple[str, ...]) -> None:
    """Gives each row its report as `text`, and the numbers of its study and of that text as `sibling_ids`."""
    for row in rows:
        row["text"] = report_text(row, fields)
        row["sibling_ids"] = [_number(row["study_id"]), _number(" ".join(row["text"].split()))]


def _number(text: str) -> int:
    """The same 64 bits for the same text in all processes, for tensors that are compared between them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def report_text(row: dict[str, Any], fields: tuple[str, ...] = ("findings", "impression")) -> str:
    """The row's report: its fields, each under its heading, in the usual order."""
    return " ".join(f"{field.capitalize()}: {row[field].strip()}" for field in fields if row[field])


def generation_rows(
    reports: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    fields: tuple[str, ...],
    questions_per_row: int = 1,
    prompts: Sequence[str] = REPORT_PROMPTS,
) -> list[dict[str, Any]]:
    """
    Report and question rows as `volume_name` and `turns`, a list of (question, answer).

    Reports take the first prompt, one a row, and keep all as `prompts`, of which [`ReportCollator`] may draw another;
    up to `questions_per_row` questions of a volume share a row.
    """
    rows = [
        {
            "volume_name": row["volume_name"],
            "turns": [(prompts[0], report_text(row, fields))],
            "prompts": tuple(prompts),
        }
        for row in reports
    ]
    asked: dict[str, list[tuple[str, str]]] = {}
    for row in questions:
        asked.setdefault(row["volume_name"], []).append((row["question"], row["answer"]))
    for volume_name, turns in asked.items():
        for start in range(0, len(turns), questions_per_row):
            rows.append({"volume_name": volume_name, "turns": turns[start : start + questions_per_row]})
    return rows


class VolumeRows(torch.utils.data.Dataset):
    """
    Rows joined with their cached tensors: `{**row, "pixel_values": ..., "slice_features": ...}`.

    Args:
        rows: with `volume_name`.
        cache: holds the volume of every row, or what was computed from it.
        augmentation ([`VolumeAugmentation`], *optional*): changes each example, in every epoch otherwise.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        cache: VolumeCache,
        augmentation: VolumeAugmentation | None = None,
    ):
        self.rows = rows
        self.cache = cache
        self.augmentation = augmentation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        example = {**row, **self.cache[row["volume_name"]], "index": index, "epoch": self.epoch}
        return example if self.augmentation is None else self.augmentation(example, self.epoch)


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
