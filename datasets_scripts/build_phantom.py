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

from hsenet.corpora.card import SYNTHETIC, TAGS, CardFacts, Contents, write_card
from hsenet.corpora.files import claim_folder, write_atomically
from hsenet.corpora.leakage import find_leaks
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
FACTS = CardFacts(
    script="build_phantom.py",
    name="HSENet phantoms",
    license="apache-2.0",
    terms="Use, change and pass on as it allows.",
    source="nothing: `hsenet.phantom` draws every volume and writes every sentence. The same parameters give the same "
    "bytes",
    splits="No patient is in two splits. Some patients have two studies (scan letters a and b) with partly the same "
    "findings; some studies have two reconstructions (last number of the name), which share the report.",
    citation="The package hsenet; no paper describes the phantoms.",
    what="Procedural chest CTs with reports, questions and masks. **Synthetic:** no patient, scan or report was used.",
    scans=(
        "Drawn, not scanned. Files are `volumes/SPLIT/SPLIT_PATIENT_SCAN_RECONSTRUCTION.nii.gz`, and those in "
        "`masks/` have the same names.",
    ),
    texts=(
        "Written by a program, which says what was drawn. Of CT-RATE's findings, these are never drawn: "
        f"{', '.join(label for label in CT_RATE_LABELS if label not in PHANTOM_LABELS)}.",
    ),
    intended="Teaching and testing software on 3D CT and text. The phantoms are no substitute for real scans, and a "
    "score on them says nothing about clinical use.",
    tags=(*TAGS, "chest", SYNTHETIC),
)
STUDY_COLUMNS = {
    "volume": (Value("string"), "the scan's file in this folder"),
    "volume_name": (Value("string"), "its name, unique in the dataset"),
    "study_id": (Value("string"), "examination; its reconstructions share the report"),
    "patient_id": (Value("string"), "patient, in one split only"),
}
REPORT = {
    **STUDY_COLUMNS,
    "mask": (
        Value("string"),
        "the file of its mask: uint8, 0 or 1 + the index of the label; a voxel of two findings holds the one drawn "
        "last, the smaller",
    ),
    "reconstruction": (Value("int8"), "number of the reconstruction in its study, from 1"),
    "age": (Value("int16"), "years"),
    "sex": (Value("string"), "M or F"),
    "findings": (Value("string"), "the report's findings"),
    "impression": (Value("string"), "the report's conclusion"),
    "labels": (
        Sequence(Value("int8"), length=len(CT_RATE_LABELS)),
        f"0 or 1 for each of CT-RATE's {len(CT_RATE_LABELS)} findings, in this order: {', '.join(CT_RATE_LABELS)}",
    ),
    "details": (
        Value("string"),
        "JSON: side, lobe, size in mm, count, severity, kind and lesions of each finding, these in patient "
        "coordinates",
    ),
}
VQA = {
    **STUDY_COLUMNS,
    "question": (Value("string"), "about the study's first reconstruction"),
    "answer": (Value("string"), "what was drawn"),
    "question_type": (Value("string"), "presence, location, size or count"),
    "label": (Value("string"), "the finding asked about"),
}
REPORT_FEATURES, VQA_FEATURES = (
    Features({name: feature for name, (feature, _) in columns.items()}) for columns in (REPORT, VQA)
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


def card_contents(parameters: dict, studies: dict[str, list[PhantomStudy]]) -> Contents:
    reports = {split: list(report_rows(group)) for split, group in studies.items()}
    spacing = " x ".join(f"{length:g}" for length in parameters["spacing"])
    return Contents(
        parameters=parameters,
        reports=reports,
        questions={split: sum(len(study.questions) for study in group) for split, group in studies.items()},
        columns={"reports": REPORT, "vqa": VQA},
        preparation=[
            ("values", "int16 Hounsfield units"),
            ("orientation", "differs from file to file, on purpose: the affine tells it"),
            ("spacing", f"nominally {spacing} mm (x, y, z), and differs from file to file: the affine tells it"),
            ("field of view", "the chest"),
        ],
        excluded=[],
        leaks=find_leaks({**row, "split": split} for split, group in reports.items() for row in group),
        scans_hashed=False,
    )


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
    write_card(arguments.output, FACTS, card_contents(parameters, studies))
    if arguments.push_to_hub:
        push_dataset(arguments.output, arguments.push_to_hub, private=not arguments.public)


if __name__ == "__main__":
    main()
