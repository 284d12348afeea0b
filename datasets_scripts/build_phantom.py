"""Write the procedural phantoms as a data set: NIfTI volumes and masks, Parquet reports and questions, a card.

    python datasets_scripts/build_phantom.py --output data/phantom --train-studies 1500 --validation-studies 100 \
        --test-studies 150 --seed 0 --workers 2
    python datasets_scripts/build_phantom.py --output data/fine --train-studies 20 --spacing 0.75 0.75 1.5
    python datasets_scripts/build_phantom.py --output data/phantom --push-to-hub your-name/hsenet-phantom

The bytes follow from the parameters alone, whatever the number of workers. Files appear whole or not at all; an
interrupted build goes on where it stopped, and a folder built with other parameters is refused.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
from tqdm import tqdm

from hsenet.corpora.files import claim_folder, write_atomically
from hsenet.corpora.leakage import find_leaks, leakage_table
from hsenet.phantom import (
    CT_RATE_LABELS,
    PHANTOM_LABELS,
    QUICKSTART_SPACING,
    PhantomStudy,
    nifti_bytes,
    render_study,
    sample_study,
)
from hsenet.publishing import open_repository, push_dataset


GENERATOR_VERSION = 1  # raise it when the same seed gives other volumes or texts
SPLITS = ("train", "validation", "test")
STUDY_COLUMNS = {
    "volume": Value("string"),
    "volume_name": Value("string"),
    "study_id": Value("string"),
    "patient_id": Value("string"),
}
REPORT_FEATURES = Features(
    {
        **STUDY_COLUMNS,
        "mask": Value("string"),
        "reconstruction": Value("int8"),
        "age": Value("int16"),
        "sex": Value("string"),
        "findings": Value("string"),
        "impression": Value("string"),
        "labels": Sequence(Value("int8"), length=len(CT_RATE_LABELS)),
        "details": Value("string"),
    }
)
VQA_FEATURES = Features(
    {
        **STUDY_COLUMNS,
        "question": Value("string"),
        "answer": Value("string"),
        "question_type": Value("string"),
        "label": Value("string"),
    }
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the data set to")
    parser.add_argument("--train-studies", type=int, default=1500)
    parser.add_argument("--validation-studies", type=int, default=100)
    parser.add_argument("--test-studies", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw volumes")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=QUICKSTART_SPACING,
        metavar=("X", "Y", "Z"),
        help="nominal voxel size in mm",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished data set, privately")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: for everybody to see")
    return parser.parse_args()


def file_name(study: PhantomStudy, reconstruction: int, folder: str) -> str:
    """Path relative to the data set; `folder` is "volumes" or "masks"."""
    return f"{folder}/{study.split}/{study.volume_name(reconstruction)}.nii.gz"


def write_study(job: tuple[str, int], *, output: Path, seed: int, spacing: tuple[float, float, float]) -> None:
    """Draw and write all reconstructions of one study that are not there yet."""
    split, index = job
    study = sample_study(seed, index, split)
    for reconstruction in range(1, study.num_reconstructions + 1):
        volume = output / file_name(study, reconstruction, "volumes")
        mask = output / file_name(study, reconstruction, "masks")
        if volume.exists() and mask.exists():
            continue
        image = render_study(study, reconstruction, spacing=spacing)
        write_atomically(mask, nifti_bytes(image.mask, image.affine))
        write_atomically(volume, nifti_bytes(image.array, image.affine))


def study_columns(study: PhantomStudy, reconstruction: int) -> dict:
    return {
        "volume": file_name(study, reconstruction, "volumes"),
        "volume_name": study.volume_name(reconstruction),
        "study_id": study.study_id,
        "patient_id": study.patient_id,
    }


def report_rows(studies: list[PhantomStudy]) -> Iterator[dict]:
    """One row per volume; the reconstructions of a study repeat its report."""
    for study in studies:
        for reconstruction in range(1, study.num_reconstructions + 1):
            yield {
                **study_columns(study, reconstruction),
                "mask": file_name(study, reconstruction, "masks"),
                "reconstruction": reconstruction,
                "age": study.age,
                "sex": study.sex,
                "findings": study.findings_text,
                "impression": study.impression_text,
                "labels": list(study.labels),
                "details": json.dumps([asdict(finding) for finding in study.findings]),
            }


def vqa_rows(studies: list[PhantomStudy]) -> Iterator[dict]:
    """One row per question, about the first reconstruction."""
    for study in studies:
        for question in study.questions:
            yield {**study_columns(study, 1), **asdict(question)}


def write_parquet(path: Path, rows: list[dict], features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.partial")
    columns = {name: [row[name] for row in rows] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(str(partial_path))
    os.replace(partial_path, path)


def write_card(output: Path, parameters: dict, studies: dict[str, list[PhantomStudy]]) -> None:
    """README.md with the YAML that `datasets.load_dataset(folder, "reports")` and `"vqa"` read."""
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in studies)
        for config in ("reports", "vqa")
    )
    counts = "".join(
        f"| {split} | {len({study.patient_id for study in group})} | {len(group)} "
        f"| {sum(study.num_reconstructions for study in group)} "
        f"| {sum(len(study.questions) for study in group)} |\n"
        for split, group in studies.items()
    )
    rows = ({**row, "split": split} for split, group in studies.items() for row in report_rows(group))
    leakage = leakage_table(find_leaks(rows), scans_hashed=False)
    everything = [study for group in studies.values() for study in group]
    prevalence = "".join(
        f"| {label} | {1 + i} | {sum(study.labels[i] for study in everything) / len(everything):.1%} |\n"
        for i, label in enumerate(CT_RATE_LABELS)
        if label in PHANTOM_LABELS
    )
    card = CARD.format(
        configs=configs,
        counts=counts,
        leakage=leakage,
        prevalence=prevalence,
        parameters=json.dumps(parameters),
        labels=", ".join(CT_RATE_LABELS),
    )
    write_atomically(output / "README.md", card.encode())


CARD = """---
license: apache-2.0
language: [en]
pretty_name: HSENet phantoms
task_categories: [image-to-text, visual-question-answering]
tags: [medical, ct, chest, synthetic]
configs:
{configs}---

# HSENet phantoms: procedural chest CTs with reports, questions and masks

**Synthetic.** Every volume is drawn by `hsenet.phantom` and every sentence is written by it; no patient, scan or
report was used. The phantoms teach and test software. They are no substitute for real scans, and a score on them says
nothing about clinical use.

Build parameters: `{parameters}`. The same parameters give the same bytes.

| split | patients | studies | volumes | questions |
|---|---|---|---|---|
{counts}
No patient is in two splits. Some patients have two studies (scan letters a and b) with partly the same findings; some
studies have two reconstructions (last number of the name), which share the report.

{leakage}
## Files and columns

`volumes/{{split}}/{{split}}_{{patient}}_{{scan}}_{{reconstruction}}.nii.gz`: int16 HU; orientation and spacing differ
from file to file and the affine tells them. `masks/` holds uint8 files of the same names: 0, or 1 + the index of the
label (a voxel of two findings holds the one drawn last, the smaller).

`load_dataset(folder, "reports")`, one row a volume: `volume`, `mask` (paths in this folder), `volume_name`,
`study_id`, `patient_id`, `reconstruction`, `age` (years), `sex` (M, F), `findings`, `impression`, `labels` (18 of 0 or
1, order below) and `details` (JSON: side, lobe, size in mm, count, severity, kind and lesions of each finding, these
in patient coordinates).

`load_dataset(folder, "vqa")`, one row a question on a study's first reconstruction: `volume`, `volume_name`,
`study_id`, `patient_id`, `question`, `answer`, `question_type` (presence, location, size, count), `label`.

Labels in order: {labels}.

| finding drawn | value in the mask | share of the studies |
|---|---|---|
{prevalence}"""


def draw_volumes(write: Callable[[tuple[str, int]], None], jobs: list[tuple[str, int]], workers: int) -> None:
    """Run `write` on every job, in this process or in `workers` others."""
    if workers == 1:
        for job in tqdm(jobs, unit="study"):
            write(job)
        return
    # Each worker is one thread's work; several BLAS threads in each would only fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Fresh interpreters (spawn): the parent has loaded threaded libraries that a fork would copy half-way.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in tqdm(pool.imap_unordered(write, jobs, chunksize=4), total=len(jobs), unit="study"):
            pass


def main() -> None:
    arguments = parse_arguments()
    counts = (arguments.train_studies, arguments.validation_studies, arguments.test_studies)
    parameters = {
        "generator_version": GENERATOR_VERSION,
        "seed": arguments.seed,
        "spacing": list(arguments.spacing),
        "studies": dict(zip(SPLITS, counts, strict=True)),
    }
    if arguments.push_to_hub:  # asked now: drawing takes long
        open_repository(arguments.push_to_hub, repo_type="dataset", private=not arguments.public)
    claim_folder(arguments.output, parameters)

    jobs = [(split, index) for split, count in parameters["studies"].items() for index in range(count)]
    write = partial(write_study, output=arguments.output, seed=arguments.seed, spacing=tuple(arguments.spacing))
    draw_volumes(write, jobs, arguments.workers)

    disable_progress_bars()  # the Parquet files take no time
    studies = {split: [] for split, count in parameters["studies"].items() if count}
    for split, index in jobs:
        studies[split].append(sample_study(arguments.seed, index, split))
    for split, group in studies.items():
        write_parquet(arguments.output / f"reports/{split}.parquet", list(report_rows(group)), REPORT_FEATURES)
        write_parquet(arguments.output / f"vqa/{split}.parquet", list(vqa_rows(group)), VQA_FEATURES)
    write_card(arguments.output, parameters, studies)
    if arguments.push_to_hub:
        push_dataset(arguments.output, arguments.push_to_hub, private=not arguments.public)


if __name__ == "__main__":
    main()
