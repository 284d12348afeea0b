"""Checkpoints that are whole or not there: what accelerate saves, made atomic, checked, and free of trusted pickles.

A checkpoint is written under an unfinished name, then gets a manifest with the size and SHA-256 of each file, and its
final name last. What is found damaged later is reported and passed over for the newest whole one. Weights are
safetensors and the run's state is JSON; what accelerate writes with pickle (optimiser, random states) is read with
`weights_only=True`.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hsenet.digests import file_sha256
from hsenet.sharding import is_sharded


MANIFEST = "manifest.json"
STATE = "run_state.json"
WEIGHTS = "trained.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, none is whole, or it does not belong to this run."""


class Checkpoints:
    """
    The checkpoints of one run. Entering and leaving it, `save` and `load` are for all processes together.

    Of the model only what training changes is kept: parameters with a gradient, and buffers. Frozen parts, which come
    from elsewhere, are known by a hash. Where the model is sharded (FSDP2), accelerate's own files hold all of it.

    Args:
        accelerator: has prepared the model and the optimiser.
        folder (`Path`): seen by all processes.
        limit (`int`): how many are kept.
        frozen: further models that decide the loss and don't train, such as a teacher.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int, frozen: Iterable[nn.Module] = ()):
        self.accelerator = accelerator
        self.folder = folder
        self.limit = limit
        self.frozen = tuple(frozen)
        self._frozen_hash = None

    def __enter__(self) -> "Checkpoints":
        self._hooks = [
            self.accelerator.register_save_state_pre_hook(self._save_weights),
            self.accelerator.register_load_state_pre_hook(self._load_weights),
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def save(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """
        Writes `step-{step}` and deletes what is older than the `limit` newest, but not the step `best`.

        Raises:
            CheckpointError: it could not be written, on all processes; earlier checkpoints are as they were.
        """
        unfinished, is_main = self.folder / f"unfinished-{step}", self.accelerator.is_main_process
        if is_main:
            state = {**state, "step": step, "frozen_weights": self.frozen_hash()}
            self._together(lambda: self._begin(unfinished, state))
        else:
            self._together(lambda: None)
        self._together(lambda: self.accelerator.save_state(str(unfinished)))
        self._together(lambda: self._finish(unfinished, step, best) if is_main else None)

    def _begin(self, unfinished: Path, state: dict[str, Any]) -> None:
        self.remove_unfinished()
        unfinished.mkdir(parents=True)
        (unfinished / STATE).write_text(json.dumps(state, indent=1))

    def _finish(self, unfinished: Path, step: int, best: int | None) -> None:
        missing = [index for index in range(self.accelerator.num_processes) if not _random_states(unfinished, index)]
        if missing:
            raise CheckpointError(f"files of process {missing[0]} are not there: all nodes have to share output_dir")
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        entries = {str(path.relative_to(unfinished)): _entry(path) for path in files}
        for path in files:
            _sync(path)
        (unfinished / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
        _sync(unfinished / MANIFEST)
        _sync(unfinished)
        finished = self.folder / f"step-{step}"
        if finished.exists():  # found broken, or of a run that continued before it
            self._remove(finished)
        unfinished.rename(finished)
        _sync(self.folder)
        for old in self.all()[: -self.limit]:
            if old != self.path(best):
                self._remove(old)

    def _together(self, work: Callable[[], None]) -> None:
        """Does it and waits for the others, so that one process's failure is everyone's, and nobody waits for it."""
        problem, cause = None, None
        try:
            work()
        except (CheckpointError, OSError, RuntimeError, SafetensorError) as error:
            problem, cause = _in_words(error), error
        problems = [problem for problem in gather_object([problem]) if problem is not None]
        if not problems:
            return
        if self.accelerator.is_main_process:
            self.remove_unfinished()
        raise CheckpointError(
            f"The checkpoint could not be written: {problems[0]}. Make room or mend the folder, then start again: "
            f"{len(self.all())} earlier checkpoint(s) are as they were."
        ) from cause

    def _remove(self, finished: Path) -> None:
        """A kill in the middle leaves nothing behind that has a checkpoint's name."""
        removed = self.folder / f"unfinished-removed-{finished.name}"
        shutil.rmtree(removed, ignore_errors=True)
        finished.rename(removed)
        shutil.rmtree(removed)

    def remove_unfinished(self) -> None:
        for path in self.folder.glob("unfinished-*"):
            shutil.rmtree(path, ignore_errors=True)

    def path(self, step: int | None) -> Path:
        return self.folder / f"step-{step}"

    def all(self) -> list[Path]:
        """Finished ones, oldest first."""
        names = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(names, key=lambda path: int(path.name[5:]))

    def newest_whole(self, needs_best: bool = False) -> tuple[Path | None, dict[str, Any], list[str]]:
        """
        Checks checkpoints from the newest on, until one is whole. Reads all of its bytes.

        Args:
            needs_best: the best checkpoint that it names has to be whole too.

        Returns:
            Its folder, its state, and what was wrong with those that are newer; no folder if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but all are broken.
        """
        problems = []
        for path in reversed(self.all()):
            problem = problem_with(path)
            if problem is None:
                state = json.loads((path / STATE).read_text())
                best = state["progress"]["best_step"] if needs_best else None
                if best is not None and (lost := problem_with(self.path(best))):
                    problem = f"its best checkpoint, step-{best}, is broken: {lost}"
                else:
                    return path, state, problems
            problems.append(f"{path.name} is broken: {problem}")
        if problems:
            raise CheckpointError(
                f"None of the {len(problems)} checkpoints in output_dir is whole ({'; '.join(problems)}): bring one "
                "back, or delete the folder `checkpoints` to start anew."
            )
        return None, {}, []

    def load(self, path: Path) -> None:
        """Model, optimiser and random states of a checkpoint that [`newest_whole`] has found."""
        try:
            self.accelerator.load_state(str(path))
            if _random_states(path, self.accelerator.process_index):
                # Again, because accelerate says nothing when it cannot read them.
                load(path / f"random_states_{self.accelerator.process_index}.pkl")
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path.name} holds more than tensors, and reading it could run any code that somebody put there: "
                "refused."
            ) from error

    def frozen_hash(self) -> str | None:
        """SHA-256 of the weights that don't train; none where no process has all of them."""
        if is_sharded(self.accelerator):
            return None
        if self._frozen_hash is None:
            digest = hashlib.sha256()
            for model in (*map(self._bare, self.accelerator._models), *self.frozen):
                trains = model not in self.frozen
                for name, parameter in model.named_parameters():
                    if not (trains and parameter.requires_grad):
                        digest.update(name.encode())
                        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
            self._frozen_hash = digest.hexdigest()
        return self._frozen_hash

    def _save_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        if not weights:  # sharded: accelerate has written them
            return
        weights.clear()  # nothing for accelerate to write
        if self.accelerator.is_main_process:
            tensors = {name: tensor.detach().contiguous() for name, tensor in _trained(self._bare(models[0])).items()}
            save_file(tensors, Path(folder) / WEIGHTS)

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        if not models:
            return
        trained, tensors = _trained(self._bare(models.pop())), load_file(Path(folder) / WEIGHTS)
        if different := sorted(set(trained) ^ set(tensors)):
            raise CheckpointError(
                f"The checkpoint is of another model: {len(different)} of its weights are only here or only there, "
                f"such as {different[0]}."
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                if tensor.shape != tensors[name].shape:
                    found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
                    raise CheckpointError(f"The checkpoint's {name} has the shape {found}, this model's {expected}.")
                tensor.copy_(tensors[name])

    def _bare(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)


def problem_with(path: Path) -> str | None:
    """Why a checkpoint must not be used; None if all its files are as they were written."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in entries.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} of {entry['size']} bytes"
            if file_sha256(file) != entry["sha256"]:
                return f"the bytes of {name} have changed"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it is incomplete or of an older version of this package"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} is damaged"
    return None if STATE in entries else f"its {MANIFEST} names no {STATE}"


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors that training changes, by name; tied ones once."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.state_dict(keep_vars=True)
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _random_states(folder: Path, process: int) -> bool:
    return (folder / f"random_states_{process}.pkl").is_file()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _sync(path: Path) -> None:
    """To the disk; of a folder, its list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_words(error: Exception) -> str:
    """Without the path, which an OSError prints."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
