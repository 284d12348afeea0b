"""The loop that the training programs share: steps, evaluation, checkpoints, and going on where a run ended."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from hsenet.accumulation import with_num_items
from hsenet.arguments import TrainingArguments
from hsenet.checkpoints import Checkpoints
from hsenet.compilation import compile_layers
from hsenet.continuation import describe_other_layout, kept_settings, refuse_other_run
from hsenet.data import VolumeRows
from hsenet.interruption import Interrupted, Interruption, leave_signals_to_parent, started
from hsenet.progress import Progress
from hsenet.publishing import open_repository
from hsenet.run_record import RunLog, begin_record, data_fingerprint, end_record, publishable, write_curves
from hsenet.sharding import WholeModel, refuse_deepspeed
from hsenet.sources import sources_of
from hsenet.training_card import write_card


ComputeLoss = Callable[[nn.Module, dict, int], tuple[torch.Tensor, dict[str, float]]]
Evaluate = Callable[[nn.Module], dict[str, float]]


def start(arguments: TrainingArguments, **settings: Any) -> Accelerator:
    """The accelerator of this run, with its trackers, after a check that all processes found each other."""
    refuse_deepspeed()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=arguments.mixed_precision,
        # A step's batches are read ahead: the loader's end must not end it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
        # Rank 0 evaluates, and a slow rank caches scans, while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but each would train alone: check the launcher.")
    if arguments.push_to_hub is not None and accelerator.is_main_process:
        open_repository(arguments.push_to_hub, private=arguments.hub_private)  # now, not after hours of training
    torch.manual_seed(arguments.seed)
    given = {name: value for name, value in asdict(arguments).items() if name != "settings"}
    arguments.settings = publishable({**given, **settings, "num_processes": accelerator.num_processes})
    if accelerator.is_main_process:
        arguments.settings["sources"] = sources_of(settings)  # while their places are known
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        accelerator.print(
            f"{accelerator.num_processes} process(es) on {accelerator.device}, settings: {arguments.settings}"
        )
    accelerator.init_trackers(Path(arguments.output_dir).name)
    return accelerator


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for biases, norms and the temperature."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        # Apart: FSDP2 shards all but scalars, and an optimiser takes a group's parameters together.
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0},
    ]


def _train_mode(model: nn.Module) -> None:
    """Training mode where something trains; frozen parts stay deterministic, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    compute_loss: ComputeLoss,
    evaluate: Evaluate,
    arguments: TrainingArguments,
    frozen: Sequence[nn.Module] = (),
) -> nn.Module:
    """
    Trains the parameters that require a gradient and returns the unwrapped model; one that is sharded, on the main
    process alone.

    A run that was interrupted continues from its newest whole checkpoint. On the same number of processes it becomes
    what it would have become undisturbed, to the bit where the device computes deterministically.

    Args:
        loader: of one process's batches before sharding; accelerate gives each process its own.
        compute_loss: `(model, batch, step)` to the loss and further values to log.
        evaluate: the unwrapped model to metrics; called on the main process only.
        frozen: models that `compute_loss` uses beside `model`: a continued run has to have the same.

    Raises:
        Interrupted: all processes have saved their state after a SIGTERM or SIGINT.
        CheckpointError: a checkpoint could not be written, or those that are there cannot be used.
    """
    if loader.num_workers:
        loader.worker_init_fn = leave_signals_to_parent
    whole = WholeModel(accelerator, model)
    if arguments.torch_compile:
        compile_layers(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay),
        lr=arguments.learning_rate,
        betas=(0.9, arguments.adam_beta2),
        fused=arguments.optim == "adamw_torch_fused",
    )
    sampler = loader.sampler
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = len(loader) // arguments.gradient_accumulation_steps
    if steps_per_epoch == 0:
        raise ValueError(
            f"Expected at least one full batch of {arguments.batch_size} rows for each of {accelerator.num_processes} "
            f"process(es) and {arguments.gradient_accumulation_steps} accumulation step(s), got {len(loader.dataset)} "
            "rows: lower batch_size."
        )
    total = arguments.max_steps if arguments.max_steps > 0 else steps_per_epoch * arguments.num_train_epochs
    scheduler = get_scheduler("cosine", optimizer.optimizer, int(total * arguments.warmup_ratio), total)
    folder = Path(arguments.output_dir) / "checkpoints"
    with Checkpoints(accelerator, folder, arguments.save_total_limit, frozen) as checkpoints:
        run = _Run(
            accelerator, arguments, checkpoints, model, whole, optimizer, scheduler, compute_loss, evaluate, total
        )
        run.resume(loader, sampler)
        with Interruption() as interruption, run.bar:
            while not run.has_ended:
                run.epoch(loader, steps_per_epoch, interruption)
        run.finish()
    trained = whole(model)
    accelerator.free_memory()  # a program may train several models, one after the other
    return trained


@dataclass
class _Run:
    """The state of one call of [`train`]."""

    accelerator: Accelerator
    arguments: TrainingArguments
    checkpoints: Checkpoints
    model: nn.Module
    whole: WholeModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    compute_loss: ComputeLoss
    evaluate: Evaluate
    total: int
    progress: Progress = field(default_factory=Progress)
    began: float = field(default_factory=time.monotonic)

    @property
    def has_ended(self) -> bool:
        return self.progress.step >= self.total or self.progress.is_exhausted(self.arguments)

    def resume(self, loader: DataLoader, sampler: Any) -> None:
        """From the newest whole checkpoint, if there is one; begins the run's record."""
        data = data_fingerprint(loader.dataset) if self.accelerator.is_main_process else {}
        self.settings = kept_settings(self.arguments, self.total, self.accelerator.num_processes, sampler, data)
        path, state = self._on_main(self._newest)
        if path is not None:
            self.checkpoints.load(path)
            self.accelerator.step = 0  # counts micro-batches; a checkpoint lies between two steps
            self.scheduler.load_state_dict(state["scheduler"])
            self.progress = Progress(**state["progress"])
            difference = describe_other_layout(state["settings"], self.settings)
            self.accelerator.print(f"Resumed from {path.name}.{difference}")
        if self.accelerator.is_main_process:
            begin_record(self.arguments, self.progress.step, self.accelerator, data)
            self.log = RunLog(self.arguments.output_dir, self.progress.step)
        self.bar = tqdm(
            total=self.total, initial=self.progress.step, disable=not self.accelerator.is_local_main_process
        )

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        self.checkpoints.remove_unfinished()
        if not self.arguments.resume:
            if self.checkpoints.all():
                raise ValueError(
                    "output_dir holds checkpoints of another run: delete them, or take another output_dir."
                )
            return None, {}
        path, state, problems = self.checkpoints.newest_whole(needs_best=self.arguments.load_best_model_at_end)
        for problem in problems:
            tqdm.write(f"Warning: {problem}. Continuing from an older one.")
        if path is not None:
            stored = {**state["settings"], "frozen_weights": state["frozen_weights"]}
            refuse_other_run(stored, {**self.settings, "frozen_weights": self.checkpoints.frozen_hash()})
        return path, state

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What the main process finds, on all processes; its error too."""
        found, error = None, None
        if self.accelerator.is_main_process:
            try:
                found = work()
            except Exception as caught:
                error = caught
        found, failed = broadcast_object_list([found, error is not None])
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("The main process has failed: its error is the one to read.")
        return found

    def epoch(self, loader: DataLoader, steps_per_epoch: int, interruption: Interruption) -> None:
        """From where the run stands to the end of the epoch, or of the run."""
        accumulation = self.arguments.gradient_accumulation_steps
        epoch, done = divmod(self.progress.step, steps_per_epoch)
        loader.set_epoch(epoch)
        if isinstance(loader.dataset, VolumeRows):
            loader.dataset.set_epoch(epoch)
        batches = self.accelerator.skip_first_batches(loader, done * accumulation) if done else loader
        _train_mode(self.model)
        mean_loss = 0.0
        # Nothing else may hold the batches: their workers end when the loop does, however it ends.
        for number, batch in enumerate(started(with_num_items(batches, self.accelerator))):
            loss, values = self._micro_batch(batch, number % accumulation)
            mean_loss = mean_loss + loss / accumulation
            if not self.accelerator.sync_gradients:
                continue
            self.scheduler.step()
            self.progress.step += 1
            self.bar.update()
            self._after_step(mean_loss, values, interruption)
            mean_loss = 0.0
            if self.progress.step % steps_per_epoch == 0 or self.has_ended:
                break

    def _micro_batch(self, batch: dict, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        # One seed each: dropout after a resume is the dropout of the undisturbed run.
        place = (self.arguments.seed, self.progress.step, number, self.accelerator.process_index)
        torch.manual_seed(hash(place))
        with self.accelerator.accumulate(self.model):
            loss, values = self.compute_loss(self.model, batch, self.progress.step)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach(), values

    def _after_step(self, loss: torch.Tensor, values: dict[str, float], interruption: Interruption) -> None:
        """Logs, evaluates and saves when it is their turn, and ends when told to."""
        step, arguments = self.progress.step, self.arguments
        if step % arguments.logging_steps == 0:
            self._log_step(loss, values)
        saves = arguments.save_steps > 0 and step % arguments.save_steps == 0
        if step == self.total or (arguments.eval_steps > 0 and step % arguments.eval_steps == 0):
            whole = self.whole(self.model)
            metrics = self._on_main(lambda: self._evaluate(whole))
            saves |= arguments.metric_for_best_model is not None and self.progress.take(metrics, arguments)
            _train_mode(self.model)
        told_to_end = interruption.agreed()
        if saves or told_to_end:
            self._save(loss)
        if told_to_end:
            self._finish_record()
            self.accelerator.print(f"Interrupted after step {step}: saved; start again to go on.")
            self.accelerator.end_training()
            raise Interrupted(128 + told_to_end)

    def _log_step(self, loss: torch.Tensor, values: dict[str, float]) -> None:
        mean = self.accelerator.reduce(loss, "mean").item()
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(
                f"The loss is {mean} at step {self.progress.step}: lower the learning rate or check the data."
            )
        logged = {"loss": mean, "learning_rate": self.scheduler.get_last_lr()[0], **values}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items()})
        self._log(logged)

    def _log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.progress.step)
        if self.accelerator.is_main_process:
            self.log.append(self.progress.step, values)

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        metrics = self.evaluate(model)
        tqdm.write(f"step {self.progress.step}: " + ", ".join(f"eval_{k} {v:.4f}" for k, v in metrics.items()))
        self._log({f"eval_{name}": value for name, value in metrics.items()})
        return metrics

    def _save(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(self.accelerator.reduce(loss, "mean")):
            raise FloatingPointError(
                f"The loss is not finite at step {self.progress.step}: no checkpoint is written over good ones."
            )
        state = {
            "settings": self.settings,
            "scheduler": self.scheduler.state_dict(),
            "progress": asdict(self.progress),
        }
        self.checkpoints.save(self.progress.step, state, self.progress.best_step)

    def finish(self) -> None:
        if self.progress.is_exhausted(self.arguments):
            self.accelerator.print(
                f"Stopped early at step {self.progress.step}: {self.progress.evaluations_without_improvement} "
                f"evaluations without a better {self.arguments.metric_for_best_model}."
            )
        if self.arguments.load_best_model_at_end:
            best = self.progress.best_step
            if best is None:
                raise ValueError("load_best_model_at_end: no evaluation gave a number, so there is no best model.")
            self.checkpoints.load(self.checkpoints.path(best))
            self.accelerator.print(f"The model is that of step {best}: {self.progress.best_metric:.4f}.")
        self._finish_record()

    def _finish_record(self) -> None:
        if self.accelerator.is_main_process:
            end_record(self.arguments.output_dir, time.monotonic() - self.began)
            write_curves(self.arguments.output_dir)
            write_card(self.arguments.output_dir)
