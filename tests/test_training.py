"""The training programs as users run them: real `accelerate launch`, real files, two processes, resumed runs."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hsenet.digests import file_sha256


ROOT = Path(__file__).parents[1]
TINY_VISION = {
    "image_size": [16, 32, 32],
    "patch_size": [8, 8, 8],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TINY_SLICES = {**TINY_VISION, "image_size": [1, 32, 32], "patch_size": [1, 16, 16], "num_channels": 3}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PLANTED = "jane-doe"  # in every local path that the programs get to know
COMMON = {"max_length": 320, "batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}


def run(command: list[str], **environment: str) -> str:
    """Runs a program outside the repository; its output is the failure's message."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir(), check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def command_for(script: str, settings: dict, folder: Path, processes: int = 1, *overrides: str) -> list[str]:
    config = folder / f"{script}_{len(list(folder.glob('*.yaml')))}.yaml"
    config.write_text(yaml.safe_dump({**COMMON, **settings}))
    # `accelerate launch --cpu --num_processes 2` would silently start one process.
    several = ["--multi_gpu"] if processes > 1 else []
    port = ["--main_process_port", "29622"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *several, *port]
    return [*command, str(ROOT / "train" / f"{script}.py"), "--config", str(config), *overrides]


def launch(script: str, settings: dict, folder: Path, processes: int = 1, *overrides: str) -> str:
    return run(command_for(script, settings, folder, processes, *overrides), ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(PLANTED)
    build = [str(ROOT / "datasets_scripts" / "build_phantom.py"), "--output", str(folder / "phantoms")]
    sizes = ["--train-studies", "8", "--validation-studies", "3", "--test-studies", "4", "--workers", "1"]
    run([sys.executable, *build, *sizes, "--spacing", "7.5", "7.5", "8"])
    return folder


def settings_for(workspace: Path, output: str, **changes) -> dict:
    return {
        "dataset": str(workspace / "phantoms"),
        "output_dir": str(workspace / output),
        "cache_dir": str(workspace / "cache"),
        **changes,
    }


@pytest.fixture(scope="module")
def foundation(workspace) -> Path:
    settings = settings_for(
        workspace,
        "foundation",
        text_config=TINY_TEXT,
        text_steps=2,
        slice_config=TINY_SLICES,
        num_slices=4,
        slice_steps=1,
        language_config={**TINY_TEXT, "num_key_value_heads": 2},
        language_steps=2,
    )
    settings.pop("cache_dir")
    launch("foundation", settings, workspace)
    return workspace / "foundation"


def stage_settings(stage: str, workspace: Path, output: str) -> dict:
    """Three steps of a stage, with a checkpoint after each."""
    foundation = workspace / "foundation"
    parts = {
        "stage1": {
            "text_encoder": str(foundation / "text_encoder"),
            "vision_config": TINY_VISION,
            "projection_dim": 16,
        },
        "stage2": {
            "stage1": str(workspace / "stage1"),
            "slice_encoder": str(foundation / "slice_encoder"),
            "num_slices": 4,
            "consistency_schedule": "linear_decay",
            "consistency_decay_steps": 2,
            "siblings": "multi_positive",
            "chunk_size": 1,
        },
        "stage3": {
            "stage1": str(workspace / "stage1"),
            "stage2": str(workspace / "stage2"),
            "language_model": str(foundation / "language_model"),
            "packer_window_size": [1, 2, 2],
            "patch_features": "cached",
        },
    }
    return settings_for(workspace, output, **parts[stage], max_steps=3, save_steps=1)


@pytest.fixture(scope="module")
def stage1(workspace, foundation) -> Path:
    launch("stage1", stage_settings("stage1", workspace, "stage1"), workspace, 2)
    return workspace / "stage1"


@pytest.fixture(scope="module")
def stage2(workspace, stage1) -> Path:
    launch("stage2", stage_settings("stage2", workspace, "stage2"), workspace, 2)
    return workspace / "stage2"


@pytest.fixture(scope="module")
def stage3(workspace, stage2) -> Path:
    launch("stage3", stage_settings("stage3", workspace, "stage3"), workspace, 2)
    return workspace / "stage3"


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_stage_trains_in_two_processes(stage, request):
    folder = request.getfixturevalue(stage)
    assert yaml.safe_load((folder / "run_config.yaml").read_text())["num_processes"] == 2
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(folder).values())
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_hsenet.py"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_resumed_run_is_the_undisturbed_run(stage, workspace, request):
    """Stopped before its last step and started again: the same loss and the same weights."""
    undisturbed, resumed = request.getfixturevalue(stage), workspace / f"{stage}_resumed"
    shutil.copytree(undisturbed, resumed)
    assert sorted(path.name for path in (resumed / "checkpoints").iterdir()) == ["step-2", "step-3"]
    shutil.rmtree(resumed / "checkpoints" / "step-3")
    (resumed / "model.safetensors").unlink()
    (resumed / "log.jsonl").unlink()
    printed = launch(stage, stage_settings(stage, workspace, resumed.name), workspace, 2)
    assert "Resumed from step-2" in printed
    assert losses(resumed) == {3: losses(undisturbed)[3]}
    ours, theirs = load_file(resumed / "model.safetensors"), load_file(undisturbed / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_ends_launched_processes_and_the_next_start_goes_on(workspace, foundation, tmp_path):
    """As a scheduler does: to the whole process group, while two processes train with loader workers."""
    settings = stage_settings("stage1", workspace, "told_to_end")
    settings |= {"max_steps": 10_000, "save_steps": -1, "loader_workers": 1}
    log, checkpoints = workspace / "told_to_end" / "log.jsonl", workspace / "told_to_end" / "checkpoints"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    saved = []
    for start in range(2):
        with (tmp_path / f"{start}.txt").open("w") as output:
            command = command_for("stage1", settings, workspace, 2)
            streams = {"stdout": output, "stderr": output, "env": environment, "cwd": tmp_path}
            process = subprocess.Popen(command, start_new_session=True, **streams)
        deadline = time.monotonic() + 120
        while not (log.exists() and len(losses(log.parent)) >= (saved or [0])[-1] + 2):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / f"{start}.txt").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(120) != 0
        printed = (tmp_path / f"{start}.txt").read_text()
        saved.append(int(re.search(r"Interrupted after step (\d+): saved", printed)[1]))
        assert f"step-{saved[-1]}" in {path.name for path in checkpoints.iterdir()}
    assert f"Resumed from step-{saved[0]}" in printed and saved[1] > saved[0]
    assert list(losses(log.parent)) == list(range(1, saved[1] + 1))


def kill_when(condition: Callable[[], bool], command: list[str], output: Path) -> None:
    """Starts a program in a process group of its own and ends all of it, launcher and workers too, with SIGKILL."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with output.open("w") as file:
        streams = {"stdout": file, "stderr": file, "env": environment, "cwd": output.parent}
        process = subprocess.Popen(command, start_new_session=True, **streams)
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_killed_program_becomes_the_undisturbed_one(processes, workers, workspace, foundation, tmp_path):
    """Four times in one run: at two random steps, and twice while a checkpoint is being written."""
    chance = random.Random(10 * processes + workers)
    name = f"killed_{processes}_{workers}"
    settings = stage_settings("stage1", workspace, name) | {"max_steps": 60, "loader_workers": workers}
    undisturbed = workspace / f"undisturbed_{processes}"
    if not undisturbed.exists():
        launch("stage1", {**settings, "output_dir": str(undisturbed), "loader_workers": 0}, workspace, processes)
    log, checkpoints = workspace / name / "log.jsonl", workspace / name / "checkpoints"
    for number, steps in enumerate(sorted(chance.sample(range(2, 50), 4))):

        def is_time(steps=steps, while_it_saves=number % 2 == 1) -> bool:
            reached = log.exists() and len(log.read_text().splitlines()) >= steps
            return reached and (not while_it_saves or any(checkpoints.glob("unfinished-[0-9]*")))

        kill_when(is_time, command_for("stage1", settings, workspace, processes), tmp_path / f"{number}.txt")
    printed = launch("stage1", settings, workspace, processes)
    assert "Resumed from step-" in printed
    assert losses(workspace / name) == losses(undisturbed) and len(losses(undisturbed)) == 60
    files = [folder / "model.safetensors" for folder in (workspace / name, undisturbed)]
    assert file_sha256(files[0]) == file_sha256(files[1])


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_nothing_local_is_in_an_output_directory(stage, request):
    """No path and no host: model, adapter, card, record and checkpoints can go anywhere."""
    folder = request.getfixturevalue(stage)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"README.md", "run_config.yaml", "environment.json", "data.json", "curves.png"} <= {f.name for f in files}
    for path in files:
        content = path.read_bytes()
        assert not [name for name in (PLANTED, str(ROOT)) if name.encode() in content], path.relative_to(folder)
    host = re.compile(rb"\b" + re.escape(socket.gethostname()).encode() + rb"\b")  # may be short: as a word, in text
    for name in ("README.md", "run_config.yaml", "environment.json", "data.json", "log.jsonl"):
        assert not host.search((folder / name).read_bytes()), name


def test_checkpoint_of_other_settings_is_refused(stage1, workspace):
    settings = {**stage_settings("stage1", workspace, "other"), "learning_rate": 5e-3}
    shutil.copytree(stage1, workspace / "other")
    with pytest.raises(AssertionError, match="other settings of learning_rate"):
        launch("stage1", settings, workspace, 2)


def test_stage2_starts_from_stage1_and_keeps_the_slice_encoder(stage1, stage2, foundation):
    first, second = load_file(stage1 / "model.safetensors"), load_file(stage2 / "model.safetensors")
    slices = load_file(foundation / "slice_encoder" / "model.safetensors")
    assert set(second) - set(first) == {name for name in second if "scorer" in name or "slice_encoder" in name}
    assert all(torch.equal(second[f"slice_encoder.{name}"], tensor) for name, tensor in slices.items())
    moved = (second["vision_model.layers.0.mlp.fc1.weight"] - first["vision_model.layers.0.mlp.fc1.weight"]).abs()
    assert 0 < moved.max() < 0.01  # three steps from stage 1, not a new initialisation


def test_stage2_guided_by_text(workspace, stage1):
    settings = {**stage_settings("stage2", workspace, "stage2_text"), "guidance": "text", "max_steps": 2}
    launch("stage2", settings, workspace)
    second = load_file(workspace / "stage2_text" / "model.safetensors")
    assert any("scorer" in name for name in second) and not any("slice_encoder" in name for name in second)
    processor = json.loads((workspace / "stage2_text" / "processor_config.json").read_text())
    assert processor["image_processor"]["num_slices"] == 0  # the model would refuse slices
    stage3 = stage_settings("stage3", workspace, "refused") | {"stage2": str(workspace / "stage2_text")}
    with pytest.raises(AssertionError, match='got guidance "text"'):
        launch("stage3", stage3, workspace)


def test_stage2_logs_the_decaying_weight_of_its_anchor(stage2):
    logged = [json.loads(line) for line in (stage2 / "log.jsonl").read_text().splitlines()]
    weights = [values["consistency_weight"] for values in logged if "consistency_weight" in values]
    assert weights == pytest.approx([0.1, 0.05, 0])


def test_stage2_starts_from_m3d_clip(stage1, foundation, workspace):
    """The converted folder's weights train, stage 1 stays the anchor, and a folder that does not fit is refused."""
    shutil.copytree(stage1, workspace / "m3d_clip", ignore=shutil.ignore_patterns("checkpoints"))
    weights = {name: tensor + 0.01 for name, tensor in load_file(stage1 / "model.safetensors").items()}
    save_file(weights, workspace / "m3d_clip" / "model.safetensors", {"format": "pt"})
    settings = stage_settings("stage2", workspace, "from_m3d_clip")
    settings |= {"init": "m3d_clip", "m3d_clip": str(workspace / "m3d_clip")}
    launch("stage2", settings, workspace, 1, "--max_steps", "1", "--learning_rate", "0")
    started = load_file(workspace / "from_m3d_clip" / "model.safetensors")
    assert all(torch.equal(started[name], tensor) for name, tensor in weights.items())
    first = json.loads((workspace / "from_m3d_clip" / "log.jsonl").read_text().splitlines()[0])
    assert first["consistency"] > 1e-3  # stage 1 is another model
    config = json.loads((workspace / "m3d_clip" / "config.json").read_text())
    config["vision_config"]["image_size"] = [32, 16, 32]  # as many patches
    (workspace / "m3d_clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match=r"M3D-CLIP reads volumes of \(32, 16, 32\), stage 1 of \(16, 32, 32\)"):
        launch("stage2", settings, workspace, 1)


def test_stage3_trains_packers_and_lora_only(stage1, stage2, stage3, foundation):
    merged = load_file(stage3 / "model.safetensors")
    for prefix, source, module in (
        ("model.global_encoder.", stage1, "vision_model."),
        ("model.local_encoder.", stage2, "vision_model."),
        ("model.slice_encoder.", stage2, "slice_encoder."),
    ):
        weights = load_file(source / "model.safetensors")
        frozen = {name.removeprefix(module): tensor for name, tensor in weights.items() if name.startswith(module)}
        assert frozen and all(torch.equal(merged[prefix + name], tensor) for name, tensor in frozen.items())
    language_model = load_file(foundation / "language_model" / "model.safetensors")
    embeddings = "embed_tokens.weight"
    assert torch.equal(merged[f"model.language_model.{embeddings}"], language_model[f"model.{embeddings}"])
    name = "layers.0.self_attn.qkv_proj.weight"
    assert not torch.equal(merged[f"model.language_model.{name}"], language_model[f"model.{name}"])
    adapter = load_file(stage3 / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "multi_modal_projector" in name for name in adapter)


def test_evaluation_scores_all_tasks_beside_their_floors(workspace, stage1, stage2, stage3):
    settings = {
        "dataset": str(workspace / "phantoms"),
        "cache_dir": str(workspace / "cache"),
        "stage1": str(stage1),
        "stage2": str(stage2),
        "model": str(stage3),
        "output_dir": str(workspace / "evaluation"),
        "max_new_tokens": 8,
    }
    config = workspace / "evaluate.yaml"
    config.write_text(yaml.safe_dump(settings))
    printed = run([sys.executable, str(ROOT / "train" / "evaluate.py"), "--config", str(config)])
    metrics = json.loads((workspace / "evaluation" / "metrics.json").read_text())
    assert metrics["num_studies"] == 4 and metrics["stage2"]["num_candidates"] == 4
    assert 0 < metrics["floors"]["constant_report"]["constant_labels_f1_macro"] <= 1
    assert metrics["model"]["report"]["num_reports"] == metrics["shuffled_volumes"]["report"]["num_reports"] == 4
    predictions = (workspace / "evaluation" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 4 + metrics["num_questions"]
    for word in ("stage1 retrieval", "stage2 retrieval", "findings_f1_macro", "accuracy"):
        assert word in printed


def test_unknown_setting_in_the_configuration_file_is_an_error(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rat: 0.1\n")
    command = [sys.executable, str(ROOT / "train" / "stage1.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "learning_rat" in done.stderr


def test_rows_come_from_the_folder_that_is_there_now(tmp_path):
    """`datasets` keeps a cache of local folders by name: a folder built anew must not give the old rows."""
    from datasets import Dataset

    from hsenet.data import load_rows

    for folder, findings in (("first", "old"), ("second", "new")):
        phantoms = tmp_path / folder / "phantoms"
        (phantoms / "reports").mkdir(parents=True)
        Dataset.from_list([{"volume": "a.nii.gz", "findings": findings}]).to_parquet(
            phantoms / "reports/train.parquet"
        )
        card = "configs:\n- config_name: reports\n  data_files:\n  - {split: train, path: reports/train.parquet}\n"
        (phantoms / "README.md").write_text(f"---\n{card}---\n")
        rows = load_rows(str(phantoms), "reports", "train")
        assert rows == [{"volume": str(phantoms / "a.nii.gz"), "findings": findings, "row": 0, "from_split": "train"}]
