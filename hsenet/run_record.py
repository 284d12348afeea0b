"""What a run leaves in its directory beside the model: settings, environment, data, metrics and their curves.

All of it may be published: a local path is reduced to its last part, and there is no name of a user or a machine.
"""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch.utils.data import Dataset


if TYPE_CHECKING:  # reading a record, for a card, needs no more than the core
    from accelerate import Accelerator

    from hsenet.arguments import TrainingArguments


CONFIG, ENVIRONMENT, DATA, LOG, CURVES = "run_config.yaml", "environment.json", "data.json", "log.jsonl", "curves.png"
_PACKAGES = ("hsenet", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")
# Of a row: where its scan lies here, and which row of which split it is.
_PLACES = ("volume", "row", "from_split")


def publishable(settings: Any) -> Any:
    """Settings as JSON has them, of local paths only the last part; Hub ids and the rest as they are."""
    if isinstance(settings, dict):
        return {name: publishable(value) for name, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [publishable(value) for value in settings]
    if isinstance(settings, str) and _is_local_path(settings):
        return PureWindowsPath(settings).name  # which splits at / too
    return settings


def _is_local_path(text: str) -> bool:
    return text.startswith(("/", "~", ".")) or "\\" in text or ("/" in text and Path(text).exists())


def write_whole(path: Path, text: str) -> None:
    """The old content or the new one, however the process ends."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


class RunLog:
    """
    `log.jsonl`: one line of numbers a time, each with its step.

    Args:
        output_dir: the run's directory.
        step (`int`): where the run stands; what an interrupted run logged after that will be logged again.
    """

    def __init__(self, output_dir: str | Path, step: int):
        self.path = Path(output_dir) / LOG
        kept = [row for row in read_log(output_dir) if row["step"] <= step] if step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_log(output_dir: str | Path) -> list[dict[str, float]]:
    """The lines of `log.jsonl`; a last one that a killed process left unfinished is passed over."""
    path = Path(output_dir) / LOG
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def begin_record(arguments: "TrainingArguments", step: int, accelerator: "Accelerator", data: dict[str, Any]) -> None:
    """
    Writes `run_config.yaml`, `data.json` and `environment.json`.

    The last says what runs the steps from `step` on, beside what ran those before: a run that was interrupted may have
    several environments.
    """
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    note = "# For the record: of local paths only the last part.\n"
    write_whole(folder / CONFIG, note + yaml.safe_dump(arguments.settings))
    write_whole(folder / DATA, json.dumps(data, indent=2) + "\n")
    path = folder / ENVIRONMENT
    earlier = json.loads(path.read_text())["starts"] if path.exists() else []
    starts = [start for start in earlier if start["from_step"] < step]
    starts.append({"from_step": step, **environment(accelerator), **git_revision()})
    write_whole(path, json.dumps({"starts": starts}, indent=2) + "\n")


def end_record(output_dir: str | Path, seconds: float) -> None:
    """How long the steps of this start took, with evaluations and checkpoints; a killed process leaves none."""
    path = Path(output_dir) / ENVIRONMENT
    starts = json.loads(path.read_text())["starts"]
    starts[-1]["seconds"] = round(seconds, 1)
    write_whole(path, json.dumps({"starts": starts}, indent=2) + "\n")


def environment(accelerator: "Accelerator") -> dict[str, Any]:
    """Versions, platform and devices; no name of a user, a machine or a folder."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": name,
        "threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> dict[str, Any]:
    """Of this package's own source, and whether it has changes; empty where it is installed without its history."""
    source = Path(__file__)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(source.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An environment inside of somebody else's repository has that one's history, not ours.
        if git("ls-files", "--error-unmatch", source.name) is None:
            return {}
        return {"git_revision": git("rev-parse", "HEAD"), "git_changes": bool(git("status", "--porcelain"))}
    except FileNotFoundError:  # no git here
        return {}


def data_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """
    Of the rows that train, in their order: how many, and a SHA-256 of their content and of their scans.

    It is the same wherever dataset and cache lie. Scans count where there is a cache that knows their voxels, with the
    cache's own name, which stands for all that decides what becomes of them.
    """
    rows = getattr(dataset, "rows", dataset)
    digest = hashlib.sha256()
    for row in rows:
        content = row if isinstance(row, dict) else vars(row)
        content = {name: value for name, value in content.items() if name not in _PLACES}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    fingerprint = {"num_rows": len(rows)}
    if cache := getattr(dataset, "cache", None):
        names = sorted({row["volume_name"] for row in rows})
        digest.update("".join([cache.folder.name, *map(cache.content_hash, names)]).encode())
        fingerprint["num_volumes"] = len(names)
    return {**fingerprint, "sha256": digest.hexdigest()}


def write_curves(output_dir: str | Path) -> None:
    """`curves.png`: each logged number over the steps, those of training and evaluation in one panel."""
    # Here, because only runs that end need it, and figures go to files: a display may be missing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = read_log(output_dir)
    names = sorted({name.removeprefix("eval_") for row in log for name in row} - {"step"})
    if not names:
        return
    figure = Figure(figsize=(4 * min(3, len(names)), 3 * -(-len(names) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(-(-len(names) // 3), min(3, len(names)), number, title=name, xlabel="step")
        for label, column in (("training", name), ("evaluation", f"eval_{name}")):
            points = [(row["step"], row[column]) for row in log if column in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=label)
        axes.legend()
    unfinished = Path(output_dir) / f"{CURVES}.tmp"
    figure.savefig(unfinished, format="png", dpi=100)
    os.replace(unfinished, Path(output_dir) / CURVES)


def read_record(output_dir: str | Path) -> dict[str, Any]:
    """What the run's directory says of it: `settings`, `starts`, `data` and `log`."""
    folder = Path(output_dir)
    return {
        "settings": yaml.safe_load((folder / CONFIG).read_text()),
        "starts": json.loads((folder / ENVIRONMENT).read_text())["starts"],
        "data": json.loads((folder / DATA).read_text()),
        "log": read_log(folder),
    }
