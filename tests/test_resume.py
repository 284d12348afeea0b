"""Runs that are killed, told to end, out of disk, or left with broken checkpoints, and started again."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
from safetensors.torch import load_file
from tiny_training import Trouble, begin, printed, run_to_end

from hsenet.checkpoints import MANIFEST
from modeling_hsenet import HSENetCLIPModel


NUM_POINTS = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_training.write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    # Its events are counted and none kills it.
    assert run_to_end(cache, folder, trouble=Trouble(kill_at_event=10**9)) == [0]
    return folder


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def steps_seen(folder: Path) -> dict[int, list]:
    """Rows of each step with what they look like, of all processes, of the last time that the step was done."""
    seen = {}
    for path in sorted(folder.glob("seen-*.jsonl")):
        of_process = {}
        for line in path.read_text().splitlines():
            step, index, pixels = json.loads(line)
            of_process.setdefault(step, []).append(list(zip(index, pixels, strict=True)))
        for step, batches in of_process.items():
            seen.setdefault(step, []).extend(row for batch in batches for row in batch)
    return {step: sorted(map(tuple, rows)) for step, rows in seen.items()}


def logged(folder: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def assert_is(folder: Path, undisturbed: Path) -> None:
    assert (folder / "log.jsonl").read_text() == (undisturbed / "log.jsonl").read_text()
    assert sha256(folder) == sha256(undisturbed)


def kill_and_resume(cache: Path, undisturbed: Path, folder: Path, number: int) -> None:
    """Even points lie between two changes of files, which most often are a checkpoint's; odd ones at any time."""
    chance = random.Random(number)
    workers = 2 * (number // 2 % 2)
    if number % 2 == 0:
        last = int(Path(f"{undisturbed}.events").read_text())
        trouble = Trouble(kill_at_event=chance.randint(1, last))
        assert run_to_end(cache, folder, trouble=trouble, loader_workers=workers) == [-9]
    else:
        (process,) = begin(cache, folder, loader_workers=workers)
        log = folder / "log.jsonl"
        tiny_training.wait_until(lambda: process.exitcode is not None or (log.exists() and log.read_text()))
        process.join(chance.uniform(0, 1))
        process.kill()
        process.join()
        # On a fast machine it may have come to its end.
        assert process.exitcode in (-9, 0)
    assert run_to_end(cache, folder, loader_workers=workers) == [0], printed(folder)
    assert_is(folder, undisturbed)


@pytest.mark.parametrize("number", range(4))
def test_killed_run_becomes_the_undisturbed_one(number, cache, undisturbed, tmp_path):
    kill_and_resume(cache, undisturbed, tmp_path / "run", number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4, NUM_POINTS))
def test_killed_run_becomes_the_undisturbed_one_anywhere(number, cache, undisturbed, tmp_path):
    kill_and_resume(cache, undisturbed, tmp_path / "run", number)


def ended_in_the_middle(undisturbed: Path, folder: Path) -> Path:
    """As the undisturbed run would be, had it ended before its model was written; with steps 10 and 12."""
    shutil.copytree(undisturbed, folder)
    (folder / "model.safetensors").unlink()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-10", "step-12"]
    return folder / "checkpoints" / "step-12"


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BROKEN = {
    "empty": (lambda step: [path.unlink() for path in step.iterdir()], "no manifest.json"),
    "no model": (lambda step: (step / "trained.safetensors").unlink(), "trained.safetensors is missing"),
    "model cut": (lambda step: cut(step / "trained.safetensors", 0.5), "trained.safetensors has"),
    "optimizer cut": (lambda step: cut(step / "optimizer.bin", 0.99), "optimizer.bin has"),
    "state cut": (lambda step: cut(step / "run_state.json", 0), "run_state.json has 0 of"),
    "no optimizer": (lambda step: (step / "optimizer.bin").unlink(), "optimizer.bin is missing"),
    "no random states": (lambda step: (step / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
    "bad JSON": (lambda step: (step / MANIFEST).write_text("{"), "manifest.json is damaged"),
    "a flipped bit": (lambda step: flip(step / "optimizer.bin"), "bytes of optimizer.bin have changed"),
}


@pytest.mark.parametrize("variant", BROKEN)
def test_broken_checkpoint_is_reported_and_passed_over(variant, cache, undisturbed, tmp_path):
    newest = ended_in_the_middle(undisturbed, tmp_path / "run")
    damage, problem = BROKEN[variant]
    damage(newest)
    assert run_to_end(cache, tmp_path / "run") == [0], printed(tmp_path / "run")
    text = printed(tmp_path / "run")
    assert "Warning: step-12 is broken" in text and problem in text and "Resumed from step-10" in text
    assert_is(tmp_path / "run", undisturbed)


def test_run_without_a_whole_checkpoint_does_not_start_anew(cache, undisturbed, tmp_path):
    newest = ended_in_the_middle(undisturbed, tmp_path / "run")
    for step in newest.parent.iterdir():
        flip(step / "trained.safetensors")
    assert run_to_end(cache, tmp_path / "run") == [1]
    text = printed(tmp_path / "run")
    assert "None of the 2 checkpoints in output_dir is whole" in text and "step-10 is broken" in text
    assert not (tmp_path / "run" / "model.safetensors").exists()


class Hostile:
    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_pickled_code_in_a_checkpoint_is_refused(name, cache, undisturbed, tmp_path):
    """Its manifest fits, so only the reading can refuse it."""
    newest = ended_in_the_middle(undisturbed, tmp_path / "run")
    content = pickle.dumps(Hostile(tmp_path / "it_ran"))
    (newest / name).write_bytes(content)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / MANIFEST).write_text(json.dumps(manifest))
    assert run_to_end(cache, tmp_path / "run") == [1]
    assert "could run any code" in printed(tmp_path / "run")
    assert not (tmp_path / "it_ran").exists()


def test_full_disk_keeps_earlier_checkpoints(cache, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.rmtree(ended_in_the_middle(undisturbed, run))
    largest = (run / "checkpoints" / "step-10" / "optimizer.bin").stat().st_size
    before = {path: path.read_bytes() for path in (run / "checkpoints" / "step-10").iterdir()}
    assert run_to_end(cache, run, trouble=Trouble(largest_file=largest // 2)) == [1]
    text = printed(run)
    assert "Resumed from step-10" in text and "The checkpoint could not be written" in text
    assert "1 earlier checkpoint(s) are as they were" in text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-10"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run_to_end(cache, run) == [0]
    assert_is(run, undisturbed)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_at_the_end_of_the_step(workers, cache, undisturbed, tmp_path):
    trouble = Trouble(signal_at_step=6)
    assert run_to_end(cache, tmp_path / "run", trouble=trouble, save_steps=-1, loader_workers=workers) == [143]
    assert "Interrupted after step 7: saved" in printed(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-7"]
    assert run_to_end(cache, tmp_path / "run", loader_workers=workers) == [0]
    assert "Resumed from step-7" in printed(tmp_path / "run")
    assert_is(tmp_path / "run", undisturbed)


STARTING_WORKERS = """
import os, signal, threading, time
from torch.utils.data import DataLoader
from hsenet.interruption import Interruption, leave_signals_to_parent, started

def start_slowly(worker):
    time.sleep(1)
    leave_signals_to_parent(worker)

def batches_of(loader):
    yield from loader

if __name__ == "__main__":
    loader = DataLoader(range(4), num_workers=1, worker_init_fn=start_slowly)
    with Interruption() as interruption:
        threading.Timer(0.5, os.killpg, (0, signal.SIGTERM)).start()
        print(len(list(started(batches_of(loader)))), interruption.agreed())
"""


def test_sigterm_while_workers_start_waits_as_well(tmp_path):
    """To the whole group, when torch would still let it end a worker."""
    (tmp_path / "program.py").write_text(STARTING_WORKERS)
    command = [sys.executable, tmp_path / "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True)
    assert run.stdout.split() == ["4", "15"], run.stderr


def test_one_process_of_two_gets_sigterm_and_both_save(cache, tmp_path):
    assert run_to_end(cache, tmp_path / "undisturbed", processes=2) == [0, 0]
    trouble = Trouble(signal_at_step=2)
    assert run_to_end(cache, tmp_path / "run", processes=2, trouble=trouble) == [143, 143]
    assert run_to_end(cache, tmp_path / "run", processes=2) == [0, 0]
    assert "Resumed from step-3" in printed(tmp_path / "run")
    assert_is(tmp_path / "run", tmp_path / "undisturbed")


def test_sharded_run_is_killed_and_goes_on(cache, tmp_path):
    """FSDP2 from the first step to the folder that loads: evaluations, checkpoints in parts with their manifest."""
    sharded = {"processes": 2, "sharded": True, "eval_steps": 2}
    assert run_to_end(cache, tmp_path / "undisturbed", **sharded) == [0, 0], printed(tmp_path / "undisturbed")
    begun = begin(cache, tmp_path / "run", **sharded)
    tiny_training.wait_until((tmp_path / "run" / "checkpoints" / "step-2").exists)
    for process in begun:
        process.kill()
        process.join()
    assert [process.exitcode for process in begun] == [-9, -9]
    parts = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "step-2").rglob("*.distcp"))
    assert len(parts) == 4  # of the model and of the optimiser, for each process
    assert run_to_end(cache, tmp_path / "run", **sharded) == [0, 0], printed(tmp_path / "run")
    assert "Resumed from step-" in printed(tmp_path / "run")
    assert_is(tmp_path / "run", tmp_path / "undisturbed")
    assert len(logged(tmp_path / "run", "eval_loss")) == 3
    HSENetCLIPModel.from_pretrained(tmp_path / "run")
    assert run_to_end(cache, tmp_path / "whole", processes=2, eval_steps=2) == [0, 0]
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"processes": 2}, {"processes": 1, "batch_size": 4}),
        ({"processes": 1, "batch_size": 4}, {"processes": 2}),
        ({"processes": 2}, {"processes": 1, "gradient_accumulation_steps": 2}),
    ],
    ids=["two to one", "one to two", "two to one with accumulation"],
)
def test_other_number_of_processes_goes_on_with_the_same_rows(before, after, cache, tmp_path):
    """Without dropout even the losses agree, to rounding, unless the contrastive batch is another one."""
    quiet = {"dropout": 0.0, "rewrite": False, "save_steps": 1}
    assert run_to_end(cache, tmp_path / "undisturbed", **quiet, **before) == [0] * before["processes"]
    trouble = Trouble(signal_at_step=3)
    assert run_to_end(cache, tmp_path / "run", trouble=trouble, **quiet, **before) == [143] * before["processes"]
    assert run_to_end(cache, tmp_path / "run", **quiet, **after) == [0] * after["processes"]
    text = printed(tmp_path / "run")
    assert "each step has the same rows in the same order" in text
    assert steps_seen(tmp_path / "run") == steps_seen(tmp_path / "undisturbed")
    changes_the_loss = "gradient_accumulation_steps" in after
    assert ("A contrastive loss compares 2 rows now, 4 before" in text) == changes_the_loss
    if not changes_the_loss:
        assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "undisturbed"), abs=1e-5)
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "undisturbed"))
        # A tenth of the largest change of one step: where a gradient is almost nothing, Adam makes rounding larger.
        assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "the same rows in each step"),
        ({"learning_rate": 2e-3}, "other settings of learning_rate"),
        ({"rewrite": False}, "other settings of rewrite_reports"),
        ({"num_train_epochs": 3}, "other settings of total_steps"),
        ({"resume": False}, "checkpoints of another run"),
    ],
)
def test_run_that_would_not_be_the_same_one_is_refused(change, message, cache, undisturbed, tmp_path):
    ended_in_the_middle(undisturbed, tmp_path / "run")
    settings = {"max_steps": 12, **change} if "batch_size" in change else change
    assert run_to_end(cache, tmp_path / "run", **settings) == [1]
    assert message in printed(tmp_path / "run")


def test_other_scans_are_refused(cache, undisturbed, tmp_path):
    """The rows are the same, but a scan was replaced."""
    ended_in_the_middle(undisturbed, tmp_path / "run")
    shutil.copytree(cache, tmp_path / cache.name)
    other = tiny_training.VolumeCache(tmp_path / cache.name)
    row = tiny_training.rows()[5]
    other.write(row, other[row["volume_name"]], content_hash="another scan")
    assert run_to_end(tmp_path / cache.name, tmp_path / "run") == [1]
    assert "other settings of training_rows" in printed(tmp_path / "run")
