"""Batches shared out among processes and kept on disk: a run that was cut off, or had other processes, ends the same.

Batches are cut before they are shared out, each has its own seed and its own file, and the folder's name says all that
the results depend on. So nothing is done twice, nothing of other settings is taken over, and only the texts, never the
volumes, are in memory together.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hsenet.collators import ContrastiveCollator
from hsenet.data import VolumeRows
from hsenet.digests import digest
from hsenet.embedding import tokenizer_hash
from hsenet.evaluation import embed, generate_answers
from hsenet.scans import scan_identity
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


@dataclass(frozen=True)
class Generation:
    """How texts are generated: 0 as temperature takes the likeliest token at every step."""

    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """What decides beside the weights, such as the number of heads; not where they were loaded from."""
    settings = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in settings.items() if name != "_name_or_path"}


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """A short name of what is asked about which scans, as they are now."""
    return digest([[row["volume_name"], scan_identity(row), row.get("question"), row.get("text")] for row in rows])


def share_out(folder: Path, num_batches: int, write: Callable[[int, Path], None], run: Accelerator) -> list[Path]:
    """The files of all batches, in order: each process writes its share, but what is already there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}" for number in range(num_batches)]
    mine = [
        number for number in range(run.process_index, num_batches, run.num_processes) if not paths[number].exists()
    ]
    for number in tqdm(mine, folder.parent.name, disable=not mine or not run.is_main_process):
        unfinished = paths[number].with_suffix(f".{os.getpid()}.tmp")
        write(number, unfinished)
        unfinished.rename(paths[number])  # a file with the final name is always whole
    run.wait_for_everyone()
    if missing := sum(not path.exists() for path in paths):
        raise RuntimeError(
            f"{missing} of {num_batches} batches of other processes are not there: put output_dir and cache_dir on a "
            "file system that all nodes share."
        )
    return paths


def embeddings_of(
    rows: Sequence[dict[str, Any]],
    model: HSENetCLIPModel,
    model_sha: str,
    collator: ContrastiveCollator,
    volumes: Any,
    batch_size: int,
    folder: Path,
    run: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Unit embeddings of volumes and texts, `(num_rows, projection_dim)` each; `model_sha` is its `model_digest`.

    Raises:
        ValueError: the model is guided by text, so that a volume's embedding would hold the report to be found.
    """
    if model.guided_by_text:
        raise ValueError(
            f'Expected a model whose volumes have embeddings of their own, got guidance "{model.config.guidance}": '
            "each report scores the patches. Its retrieval is measured over all pairs, by train/experiment.py."
        )
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def write(number: int, path: Path) -> None:
        images, texts = embed(model, VolumeRows(batches[number], volumes), collator, len(batches[number]))
        save_file({"images": images.contiguous(), "texts": texts.contiguous()}, path)

    read = [tokenizer_hash(collator.tokenizer), collator.max_length]
    key = digest([model_sha, _settings(model), read, rows_digest(rows), batch_size, volumes.folder.name])
    parts = [load_file(path) for path in share_out(folder / key, len(batches), write, run)]
    return torch.cat([part["images"] for part in parts]), torch.cat([part["texts"] for part in parts])


def answers_to(
    rows: Sequence[dict[str, Any]],
    model: HSENetForConditionalGeneration,
    model_sha: str,
    processor: HSENetProcessor,
    volumes: Any,
    generation: Generation,
    folder: Path,
    run: Accelerator,
) -> list[str]:
    """The generated answer to the `question` of each row about its volume; `model_sha` is the `model_digest`."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["question"]))  # less padding
    size = generation.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def write(number: int, path: Path) -> None:
        picked = VolumeRows([rows[index] for index in batches[number]], volumes)
        torch.manual_seed(hash((generation.seed, number)))
        settings = (len(picked), generation.max_new_tokens, generation.temperature)
        generated = generate_answers(model, processor, picked, *settings)
        path.write_text(json.dumps([text for _, text in generated]))

    read = [tokenizer_hash(processor.tokenizer), processor.prompt("{question}")]
    made_by = [model_sha, _settings(model), json.loads(model.generation_config.to_json_string()), asdict(generation)]
    key = digest([made_by, read, rows_digest(rows), volumes.folder.name])
    answers = [""] * len(rows)
    for batch, path in zip(batches, share_out(folder / key, len(batches), write, run), strict=True):
        for index, text in zip(batch, json.loads(path.read_text()), strict=True):
            answers[index] = text
    return answers
