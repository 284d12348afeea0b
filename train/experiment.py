"""The paper's ablations, and two checks that it leaves open, on phantoms: arms, seeds, tables, verdicts.

    python train/experiment.py guidance --output_dir outputs/experiments
    python train/experiment.py guidance projectors --launch "accelerate launch --num_processes 8"

Needs `pip install -e ".[train,experiments]"` and, in `outputs/experiments`, what `docs/experiments.md` builds first.
Each name is a file of `train/configs/experiments`; a path to another such file will do. An arm is a run of
`train/stage2.py` or `train/stage3.py` with one seed. Finished arms are not run again, and experiments that have an
arm in common share it. Writes `NAME.json` and `NAME.md` into the output directory.
"""

import argparse
import gc
import hashlib
import importlib
import inspect
import json
import resource
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hsenet.arguments import parse_arguments
from hsenet.digests import file_sha256
from hsenet.experiments.alignment import alignment
from hsenet.experiments.nodules import nodule_auroc
from hsenet.experiments.scores import presence_scores, retrieval_scores
from hsenet.experiments.tables import alignment_table, arms_table, experiment_record, nodule_table


ROOT = Path(__file__).parent
CONFIGS = ROOT / "configs" / "experiments"
SCORES: dict[str, Callable[..., dict[str, float]]] = {"retrieval": retrieval_scores, "presence": presence_scores}


def load_experiment(name: str) -> dict[str, Any]:
    """A file of `configs/experiments`, its arms with all their settings."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    experiment = yaml.safe_load(path.read_text())
    common = yaml.safe_load((path.parent / experiment["settings"]).read_text())
    experiment["name"] = path.stem
    experiment["arms"] = {arm: {**common, **changes} for arm, changes in experiment["arms"].items()}
    return experiment


def run_folder(stage: str, settings: dict[str, Any], output_dir: Path) -> Path:
    """The same for equal settings, models and tables, whichever experiment they belong to."""
    names = [name for name, value in settings.items() if isinstance(value, str) and name != "cache_dir"]
    made_from = {name: _content(settings[name]) for name in names if Path(settings[name]).is_dir()}
    digest = hashlib.sha256(json.dumps([stage, settings, made_from], sort_keys=True).encode()).hexdigest()[:12]
    return output_dir / "runs" / f"{stage}_{digest}_seed{settings['seed']}"


def _content(folder: str) -> str:
    """SHA-256 of a model's weights or a dataset's tables: a path doesn't show that they were made anew."""
    return file_sha256(*sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*/*.parquet")]))


def train_arm(stage: str, settings: dict[str, Any], folder: Path, launch: list[str]) -> None:
    """One run of a stage; `run.json` is written last and tells that it is whole."""
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "settings.yaml"
    passed = {name: value for name, value in settings.items() if name != "max_test_rows"}
    config.write_text(yaml.safe_dump({**passed, "output_dir": str(folder)}))
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    if launch:
        subprocess.run([*launch, str(ROOT / f"{stage}.py"), "--config", str(config)], check=True)
    else:
        module = importlib.import_module(stage)
        groups = [parameter.annotation for parameter in inspect.signature(module.main).parameters.values()]
        module.main(*parse_arguments(*groups, argv=["--config", str(config)]))
        gc.collect()
    record = {"settings": settings, "seconds": time.perf_counter() - started}
    record["cpu_seconds"] = _cpu_seconds() - cpu_started
    (folder / "run.json").write_text(json.dumps(record, indent=1))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def score_arm(experiment: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """The arm's scores, kept beside its model."""
    kind, options = experiment["score"], experiment.get("score_settings", {})
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{kind}_{digest}.json"
    if not path.exists():
        path.write_text(json.dumps(SCORES[kind](folder, settings, **options)))
    return json.loads(path.read_text())


def run_experiment(experiment: dict[str, Any], output_dir: Path, launch: list[str]) -> tuple[dict[str, Any], str]:
    """All arms and seeds, then the table: the record for the JSON file, and Markdown."""
    folders: dict[str, list[Path]] = {arm: [] for arm in experiment["arms"]}
    scores: dict[str, list[dict[str, float]]] = {arm: [] for arm in experiment["arms"]}
    for seed in experiment["seeds"]:
        for arm, settings in experiment["arms"].items():
            settings = {**settings, "seed": seed}
            folder = run_folder(experiment["stage"], settings, output_dir)
            print(f"{experiment['name']}: {arm}, seed {seed}: {folder.name}", flush=True)
            train_arm(experiment["stage"], settings, folder, launch)
            folders[arm].append(folder)
            if experiment["score"] in SCORES:
                scores[arm].append(score_arm(experiment, settings, folder))
    if experiment["score"] == "alignment":
        (arm,) = experiment["arms"]
        result = alignment(folders[arm], experiment["arms"][arm], **experiment["score_settings"])
        table = alignment_table(experiment, result)
    elif experiment["score"] == "nodules":
        result = nodule_auroc(folders, **experiment["score_settings"])
        table = nodule_table(experiment, result)
    else:
        result, table = scores, arms_table(experiment, scores)
    runs = {arm: [json.loads((run / "run.json").read_text()) for run in of_seeds] for arm, of_seeds in folders.items()}
    return experiment_record(experiment, result, runs), table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="experiments, in order")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those in the file")
    parser.add_argument("--launch", default="", help="command that starts an arm; by default it runs in this process")
    arguments = parser.parse_args()
    for name in arguments.names:
        experiment = load_experiment(name)
        if arguments.seeds:
            experiment["seeds"] = arguments.seeds
        record, table = run_experiment(experiment, arguments.output_dir, shlex.split(arguments.launch))
        (arguments.output_dir / f"{experiment['name']}.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output_dir / f"{experiment['name']}.md").write_text(table)
        print(table, flush=True)


if __name__ == "__main__":
    main()
