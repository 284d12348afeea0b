"""What the three training programs share: arguments, the loop, checkpoints that resume, and logging."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, get_scheduler

from hsenet.augmentation import AugmentationArguments
from hsenet.data import VolumeRows


@dataclass
class DataArguments(AugmentationArguments):
    dataset: str = field(default="", metadata={"help": "Dataset folder or Hub id with `reports` (and `vqa`) rows."})
    train_split: str = field(default="train")
    eval_split: str = field(default="validation", metadata={"help": "Never the split of the final evaluation."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first rows while training."})
    max_length: int = field(default=512, metadata={"help": "Longest text (stage 3: prompt and answer) in tokens."})
    report_fields: list[str] = field(default_factory=lambda: ["findings", "impression"])
    question_types: list[str] = field(
        default_factory=list, metadata={"help": "Stage 3: only questions of these types; empty: all."}
    )
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Where preprocessed volumes are kept."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read scans while the cache is built."})
    max_failures: int = field(default=0, metadata={"help": "How many unreadable volumes may be left out."})
    cache_only: bool = field(default=False, metadata={"help": "Build the cache and end."})
    loader_workers: int = field(default=0, metadata={"help": "Processes that load batches while training."})


@dataclass
class TrainingArguments:
    output_dir: str = field(default="", metadata={"help": "The trained model and the run's checkpoints go here."})
    seed: int = field(default=42)
    learning_rate: float = field(default=1e-4)
    weight_decay: float = field(default=0.1)
    adam_beta2: float = field(default=0.999)
    max_grad_norm: float = field(default=1.0)
    warmup_ratio: float = field(default=0.03, metadata={"help": "Share of the steps with a rising learning rate."})
    num_train_epochs: int = field(default=1)
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps; -1: after all epochs."})
    batch_size: int = field(default=3, metadata={"help": "Rows of one process in one forward pass."})
    gradient_accumulation_steps: int = field(default=1)
    gradient_checkpointing: bool = field(default=False)
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    logging_steps: int = field(default=10)
    eval_steps: int = field(default=-1, metadata={"help": "Evaluate every so many steps; -1: only at the end."})
    save_steps: int = field(default=-1, metadata={"help": "Write a checkpoint every so many steps; -1: none."})
    save_total_limit: int = field(default=2)
    resume: bool = field(default=True, metadata={"help": "Continue from the newest checkpoint in output_dir."})
    report_to: list[str] = field(default_factory=list, metadata={"help": "tensorboard, wandb, ..."})


def parse_arguments(*dataclasses: type, argv: list[str] | None = None) -> tuple:
    """Dataclasses from `--config file.yaml`, whose values become defaults, and from the command line, which wins."""
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {}
    if "--config" in argv:
        position = argv.index("--config")
        settings = yaml.safe_load(Path(argv[position + 1]).read_text())
        del argv[position : position + 2]
    parser = HfArgumentParser(dataclasses)
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"Unknown settings in the configuration file: {', '.join(unknown)}.")
    parser.set_defaults(**settings)
    for action in parser._actions:
        if action.type is dict:  # on the command line a dictionary is JSON
            action.type = json.loads
    parsed = parser.parse_args_into_dataclasses(argv)
    for name, value in ((name, value) for group in parsed for name, value in vars(group).items()):
        if value == "":  # the default of what every run has to say
            raise ValueError(f"--{name} is missing: give it on the command line or in the configuration file.")
    return parsed


def start(arguments: TrainingArguments, **settings: Any) -> Accelerator:
    """The accelerator of this run, with its trackers, after a check that all processes found each other."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # Rank 0 evaluates, and a slow rank caches scans, while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but each would train alone: check the launcher.")
    torch.manual_seed(arguments.seed)
    if accelerator.is_main_process:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        resolved = {**asdict(arguments), **settings, "num_processes": accelerator.num_processes}
        (Path(arguments.output_dir) / "run_config.yaml").write_text(yaml.safe_dump(resolved))
        accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}, settings: {resolved}")
    accelerator.init_trackers(Path(arguments.output_dir).name)
    return accelerator


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for biases, norms and the temperature."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _train_mode(model: torch.nn.Module) -> None:
    """Training mode where something trains; frozen parts stay deterministic, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint, with what a continued run must have in common."""

    settings: dict
    step: int = 0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        if changed := sorted(name for name in self.settings if self.settings[name] != state["settings"].get(name)):
            raise ValueError(
                f"The checkpoint was written with other settings of {', '.join(changed)}: use them, or another "
                "output_dir, or delete the checkpoints."
            )
        self.step = state["step"]


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: DataLoader,
    compute_loss: Callable[[torch.nn.Module, dict, int], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
    arguments: TrainingArguments,
) -> torch.nn.Module:
    """
    Trains the parameters that require a gradient and returns the unwrapped model.

    Args:
        loader: of one process's batches before sharding; accelerate gives each process its own.
        compute_loss: `(model, batch, step)` to the loss and further values to log.
        evaluate: the unwrapped model to metrics; called on the main process only.
    """
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, arguments.weight_decay),
        lr=arguments.learning_rate,
        betas=(0.9, arguments.adam_beta2),
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accumulation = arguments.gradient_accumulation_steps
    steps_per_epoch = len(loader) // accumulation
    if steps_per_epoch == 0:
        raise ValueError(
            f"Expected at least one full batch of {arguments.batch_size} rows for each of {accelerator.num_processes} "
            f"process(es) and {accumulation} accumulation step(s), got {len(loader.dataset)} rows: lower batch_size."
        )
    total = arguments.max_steps if arguments.max_steps > 0 else steps_per_epoch * arguments.num_train_epochs
    warmup = int(total * arguments.warmup_ratio)
    scheduler = get_scheduler("cosine", optimizer.optimizer, num_warmup_steps=warmup, num_training_steps=total)
    fixed = ("seed", "learning_rate", "weight_decay", "adam_beta2", "warmup_ratio", "batch_size")
    settings = {name: getattr(arguments, name) for name in (*fixed, "gradient_accumulation_steps")}
    progress = Progress({**settings, "total_steps": total, "num_processes": accelerator.num_processes})
    accelerator.register_for_checkpointing(scheduler, progress)
    _resume(accelerator, arguments)
    bar = tqdm(total=total, initial=progress.step, disable=not accelerator.is_main_process)
    _train_mode(model)
    while progress.step < total:
        epoch, done = divmod(progress.step, steps_per_epoch)
        loader.set_epoch(epoch)
        if isinstance(loader.dataset, VolumeRows):
            loader.dataset.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, done * accumulation) if done else loader
        for number, batch in enumerate(batches):
            # One seed a step: dropout after a resume is the dropout of the undisturbed run.
            micro_batch = number % accumulation
            torch.manual_seed(hash((arguments.seed, progress.step, micro_batch, accelerator.process_index)))
            with accelerator.accumulate(model):
                loss, values = compute_loss(model, batch, progress.step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            progress.step += 1
            bar.update()
            _after_step(accelerator, model, loss, values, scheduler, progress.step, total, evaluate, arguments, bar)
            if progress.step % steps_per_epoch == 0 or progress.step == total:
                break
    bar.close()
    return accelerator.unwrap_model(model)


def _after_step(accelerator, model, loss, values, scheduler, step, total, evaluate, arguments, bar) -> None:
    """Logs, evaluates and saves when it is their turn."""
    if step % arguments.logging_steps == 0:
        mean = accelerator.reduce(loss.detach(), "mean").item()
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(f"The loss is {mean} at step {step}: lower the learning rate or check the data.")
        logged = {"loss": mean, "learning_rate": scheduler.get_last_lr()[0], **values}
        bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items()})
        _log(accelerator, logged, step, arguments)
    if step == total or (arguments.eval_steps > 0 and step % arguments.eval_steps == 0):
        if accelerator.is_main_process:
            unwrapped = accelerator.unwrap_model(model)
            unwrapped.eval()
            metrics = {f"eval_{name}": value for name, value in evaluate(unwrapped).items()}
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            _log(accelerator, metrics, step, arguments)
        accelerator.wait_for_everyone()
        _train_mode(model)
    if arguments.save_steps > 0 and step % arguments.save_steps == 0:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}: no checkpoint is written over good ones."
            )
        _save_checkpoint(accelerator, step, arguments)


def _log(accelerator: Accelerator, values: dict[str, float], step: int, arguments: TrainingArguments) -> None:
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        with (Path(arguments.output_dir) / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints, oldest first: an unfinished one has another name."""
    return sorted(Path(output_dir).glob("checkpoints/step-*"), key=lambda path: int(path.name.split("-")[1]))


def _save_checkpoint(accelerator: Accelerator, step: int, arguments: TrainingArguments) -> None:
    folder = Path(arguments.output_dir) / "checkpoints"
    unfinished, finished = folder / f"unfinished-{step}", folder / f"step-{step}"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if finished.exists():
            shutil.rmtree(finished)
        unfinished.rename(finished)
        for old in _checkpoints(arguments.output_dir)[: -arguments.save_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    checkpoints = _checkpoints(arguments.output_dir)
    if arguments.resume and checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        accelerator.print(f"Resumed from {checkpoints[-1].name}.")
