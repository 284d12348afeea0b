"""Stage 1's training at a tiny size, run in processes that can be killed: forked from one that has imported all."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path

import tiny
import torch
from processes import shard_on_cpu
from torch.utils.data import DataLoader

from hsenet.arguments import TrainingArguments
from hsenet.augmentation import AugmentationArguments, VolumeAugmentation
from hsenet.collators import ContrastiveCollator
from hsenet.contrastive import ContrastiveArguments, ContrastiveObjective
from hsenet.data import VolumeRows, add_report_texts
from hsenet.report_augmentation import ReportAugmentation
from hsenet.training import start, train
from hsenet.volume_cache import VolumeCache
from modeling_hsenet import HSENetCLIPModel


# Of the fork server too, which on older Pythons is not told where modules are.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)


NUM_ROWS = 13  # an epoch of batches leaves some over
SETTINGS = {"batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2}
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tiny_training"])


@dataclass
class Trouble:
    """
    Args:
        kill_at_event (`int`): SIGKILL before the process's so-many-th change of a file.
        signal_at_step (`int`): SIGTERM from itself in the middle of that step, on the last process.
        largest_file (`int`): bytes a file may have, as if the disk were full.
    """

    kill_at_event: int | None = None
    signal_at_step: int | None = None
    largest_file: int | None = None


def rows() -> list[dict]:
    made = [
        {
            "volume": f"{number}.nii.gz",
            "volume_name": f"scan {number}",
            "study_id": f"study {number}",
            "findings": f"{tiny.SENTENCES[number % 4]} There are {number} nodules. {tiny.SENTENCES[number % 3 + 1]}",
            "impression": f"{number} nodules. {tiny.SENTENCES[number % 5]}",
        }
        for number in range(NUM_ROWS)
    ]
    add_report_texts(made, ("findings", "impression"))
    return made


def write_cache(folder: Path) -> Path:
    cache = VolumeCache(folder / "preprocessing")
    cache.folder.mkdir()
    for number, row in enumerate(rows()):
        generator = torch.Generator().manual_seed(number)
        pixel_values = torch.rand(1, *tiny.IMAGE_SIZE, generator=generator)
        cache.write(row, {"pixel_values": pixel_values.half()}, content_hash=f"content {number}")
    return cache.folder


def run(
    cache_dir: Path, output_dir: Path, settings: dict, trouble: Trouble, dropout: float, rewrite: bool, sharded: bool
) -> None:
    """One process of a run; its trained model goes to `output_dir`, its rows by step to `seen-RANK.jsonl` there."""
    torch.set_num_threads(1)
    output_dir.mkdir(exist_ok=True)
    settings = dict(settings)
    workers, metrics = settings.pop("loader_workers", 0), settings.pop("metrics", {})
    training = TrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **settings})
    accelerator = start(training, data={"max_shift": [1, 2, 2], "rewrite_reports": rewrite})
    if sharded:
        shard_on_cpu(accelerator, ["HSENetEncoderLayer", "BertLayer"])
    config = tiny.clip_model().config
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = dropout
    torch.manual_seed(training.seed)
    model = HSENetCLIPModel(config)
    fields = ("findings", "impression")
    rewriting = ReportAugmentation(fields, 0.2, training.seed) if rewrite else None
    augmentation = AugmentationArguments(max_shift=[1, 2, 2])
    moved = VolumeAugmentation(augmentation, tiny.image_processor(num_slices=0), fields, training.seed)
    dataset = VolumeRows(rows(), VolumeCache(cache_dir), moved)
    loader = DataLoader(
        dataset,
        training.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=ContrastiveCollator(tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]"), 48, rewriting),
        num_workers=workers,
    )
    objective = ContrastiveObjective(accelerator, ContrastiveArguments())
    is_last = accelerator.process_index == accelerator.num_processes - 1
    if trouble.kill_at_event is not None:
        _kill_at_event(output_dir, trouble.kill_at_event)
    if trouble.largest_file is not None:
        _limit_files(trouble.largest_file)

    def compute_loss(model, batch, step):
        with (output_dir / f"seen-{accelerator.process_index}.jsonl").open("a") as file:
            pixels = batch["pixel_values"].flatten(1).double().sum(dim=1).tolist()
            file.write(json.dumps([step, batch["index"].tolist(), pixels]) + "\n")
        if is_last and step == trouble.signal_at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return objective(model, batch, step)

    def evaluate(model):
        torch.rand(3)  # whatever an evaluation draws must not change what trains
        if not metrics:
            return {"loss": model.logit_scale.item()}
        return {"score": metrics[str(training_step(output_dir))]}

    trained = train(accelerator, model, loader, compute_loss, evaluate, training)
    if accelerator.is_main_process:
        trained.save_pretrained(output_dir)


def training_step(output_dir: Path) -> int:
    """Of the newest logged step."""
    return json.loads((output_dir / "log.jsonl").read_text().splitlines()[-1])["step"]


def _kill_at_event(output_dir: Path, number: int) -> None:
    """Counts what Python does to files in the output directory; the hook runs before it is done."""
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        is_written = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if (event in changes or is_written) and f"{output_dir}/" in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            (Path(f"{output_dir}.events")).write_text(str(seen))

    sys.addaudithook(hook)


def _limit_files(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _entry(environment: dict[str, str], errors: Path, *arguments) -> None:
    os.environ.update(environment)
    set_start_method("fork", force=True)  # of the loader's workers, as in a program that was not forked itself
    descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    run(*arguments)


def begin(
    cache_dir: Path,
    output_dir: Path,
    *,
    processes: int = 1,
    trouble: Trouble = Trouble(),  # noqa: B008
    dropout: float = 0.1,
    rewrite: bool = True,
    sharded: bool = False,
    **settings,
) -> list[BaseProcess]:
    environments = [{}]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environments = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    arguments = (cache_dir, output_dir, settings, trouble, dropout, rewrite, sharded)
    errors = Path(f"{output_dir}.txt")
    begun = [FORKS.Process(target=_entry, args=(environment, errors, *arguments)) for environment in environments]
    for process in begun:
        process.start()
    return begun


def printed(output_dir: Path) -> str:
    return Path(f"{output_dir}.txt").read_text()


def run_to_end(cache_dir: Path, output_dir: Path, **settings) -> list[int]:
    """Exit codes."""
    begun = begin(cache_dir, output_dir, **settings)
    for process in begun:
        process.join(120)
    return [process.exitcode for process in begun]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("What the test waits for has not happened.")
        time.sleep(0.005)
