"""From a plan to a dataset folder.

    volumes/train-00000-of-00009.parquet   with --volumes nifti: rows with the scan, one scan a row group
    build/train-00000-of-00009.*           working files: what the rerun of an interrupted build finds done
    reports/train.parquet                  the same rows without the scans
    vqa/train.parquet                      questions about them
    excluded.csv, leakage.json, preview/, README.md
    corpus                                 with --volumes reference: a link to the local copy, never uploaded

With --deidentify, beside the folder and never uploaded: OUTPUT.salt, the key of the pseudonyms, and OUTPUT.names.csv,
which volume is which file of which study and patient. Uploads look for these names in what they send.
"""

import argparse
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hsenet.publishing import open_repository, push_dataset
from reading_hsenet import Volume

from .card import CardFacts, Contents, write_card
from .files import claim_folder, write_atomically
from .leakage import find_leaks, write_leaks
from .marks import SPLITS, first_patients, mark
from .parquet import read_rows, write_rows
from .preview import write_preview
from .pseudonyms import pseudonyms, without_names
from .schema import PREVIEW, QUESTION, QUESTION_FEATURES, REPORT, REPORT_FEATURES, VOLUME
from .shards import LINK, exclusion, read_file, shard_path, split_into_shards, stop_if_unreadable, write_shards
from .source import INSIDE, Corpus, CorpusError


MAX_SPACING_MM = 10.0  # the reader refuses what is coarser


@dataclass
class Plan:
    """
    What a corpus' tables say.

    Args:
        rows: the columns of `schema.REPORT` (without `volume` and the marks), `split`, and `file`, the scan's name
            in the corpus.
        excluded: `volume_name`, `split` and `reason` of what is left out.
        read: `(corpus, row)` to the scan in HU.
        questions: `volume_name`, `question`, `answer`, `question_type`, `label`, `region` of every question; those
            about volumes that are left out are dropped.
    """

    rows: list[dict[str, Any]]
    excluded: list[dict[str, str]] = field(default_factory=list)
    read: Callable[[Corpus, dict[str, Any]], Volume] = read_file
    questions: Callable[[], Iterator[dict[str, Any]]] | None = None


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, help="local folder, or URL such as hf://datasets/OWNER/NAME@COMMIT")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the dataset to")
    parser.add_argument(
        "--volumes",
        choices=("nifti", "reference"),
        default="nifti",
        help="nifti: scans in HU inside the dataset; reference: rows point into the local copy, which has to stay",
    )
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("D", "H", "W"),
        help="with --volumes nifti: average voxels into blocks of at most so many mm (default: as stored)",
    )
    parser.add_argument(
        "--deidentify",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="pseudonyms for patients, studies and volumes, ages up to 90; texts stay as they are",
    )
    parser.add_argument("--exclude", type=Path, help="file with volume names to leave out, one a line")
    parser.add_argument("--max-patients", type=int, help="only so many patients of each split: a trial")
    parser.add_argument("--present-only", action="store_true", help="leave out scans that the local copy lacks")
    parser.add_argument("--allow-unreadable", type=int, default=0, help="how many scans may fail to be read")
    parser.add_argument("--shard-rows", type=int, default=16, help="scans in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read scans")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished dataset, privately")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: for everybody to see")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """For corpora that leave the splits, or one of them, to the build."""
    parser.add_argument("--validation", type=float, default=0.05, help="share of the patients")
    parser.add_argument("--seed", type=int, default=0, help="of the split by patient")


def run(plan: Plan, corpus: Corpus, facts: CardFacts, arguments: argparse.Namespace, **parameters: Any) -> None:
    """Build the dataset of `plan` in `arguments.output`, or go on with it; `parameters` are the script's own."""
    _check(arguments, corpus)
    output = arguments.output
    rows, excluded = _select(plan, corpus, arguments)
    if arguments.deidentify:
        plan, rows, excluded = _without_names(plan, rows, excluded, output)
    rows = mark(first_patients(rows, arguments.max_patients))
    if not rows:
        raise CorpusError(f"No scan is left to build: {len(excluded)} are excluded and none remain.")
    parameters = {"script": facts.script, **parameters, **_recorded(arguments, corpus, rows)}
    claim_folder(output, parameters)
    if arguments.volumes == "reference":
        _link(output / LINK, Path(corpus.root))

    found = write_shards(rows, plan.read, corpus, arguments)
    excluded = excluded + found
    _write_table(output / "excluded.csv", excluded, ("volume_name", "split", "reason"))
    stop_if_unreadable(found, arguments)

    reports = {split: list(_report_rows(rows, split, arguments)) for split in SPLITS}
    reports = {split: group for split, group in reports.items() if group}
    for split, group in reports.items():
        write_rows(output / f"reports/{split}.parquet", group, REPORT_FEATURES)
    questions = _write_questions(output, plan, reports) if plan.questions else {}
    leaks = find_leaks({**row, "split": split} for split, group in reports.items() for row in group)
    write_leaks(output / "leakage.json", leaks)
    write_preview(output, reports)
    contents = Contents(
        parameters, reports, questions, _columns(arguments, questions), _preparation(arguments), excluded, leaks
    )
    print(write_card(output, facts, contents, is_reference=arguments.volumes == "reference"))
    if arguments.push_to_hub:
        push_dataset(output, arguments.push_to_hub, private=not arguments.public)


def _check(arguments: argparse.Namespace, corpus: Corpus) -> None:
    if arguments.volumes == "reference":
        if not corpus.is_local:
            raise SystemExit("--volumes reference needs a local copy of the corpus: use --volumes nifti.")
        if arguments.spacing:
            raise SystemExit("--spacing is of scans that are written: use it with --volumes nifti.")
        if arguments.deidentify:
            raise SystemExit("--volumes reference keeps the files' paths: use --volumes nifti, or --no-deidentify.")
        if arguments.push_to_hub:
            raise SystemExit("--volumes reference points into a local folder and is of no use on the Hub.")
    if arguments.spacing and max(arguments.spacing) > MAX_SPACING_MM:
        raise SystemExit(f"--spacing {arguments.spacing} is coarser than the {MAX_SPACING_MM:g} mm that are read.")
    if arguments.present_only and not corpus.is_local:
        raise SystemExit("--present-only is about a local copy: the Hub holds the whole corpus.")
    if arguments.push_to_hub:
        open_repository(arguments.push_to_hub, repo_type="dataset", private=not arguments.public)


def _recorded(arguments: argparse.Namespace, corpus: Corpus, rows: list[dict]) -> dict:
    """What the dataset depends on. No local path: the parameters are in the card."""
    names = ("volumes", "spacing", "deidentify", "max_patients", "present_only", "shard_rows")
    return {
        "corpus": "a local copy" if corpus.is_local else corpus.location,
        **{name: getattr(arguments, name) for name in names},
        # Shards of other tables, or of another list of exclusions, would not go together.
        "rows": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16],
    }


def _columns(arguments: argparse.Namespace, questions: dict[str, int]) -> dict[str, dict]:
    columns = {"reports": REPORT} | ({"volumes": VOLUME} if arguments.volumes == "nifti" else {})
    return columns | ({"vqa": QUESTION} if questions else {}) | {"preview": PREVIEW}


def _preparation(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """For the card: what became of a scan, and how."""
    names = "those of the source"
    if arguments.deidentify:
        names = "pseudonyms of patients, studies and volumes; 90 years stand for 90 and more; texts are as they were"
    if arguments.volumes == "reference":
        reading = "when they are read, by the file itself or by hu_slope and hu_intercept"
        return [
            ("scans", "untouched: the rows point into a local copy"),
            ("values", f"HU {reading}"),
            ("names", names),
        ]
    spacing = "as read from the source"
    if arguments.spacing:
        blocks = " x ".join(f"{length:g}" for length in arguments.spacing)
        spacing = (
            f"voxels averaged in blocks of at most {blocks} mm (depth, height, width), a last part of one cut off"
        )
    return [
        ("values", "Hounsfield units as read from the source, rounded to int16"),
        (
            "orientation",
            "by the affine that was read: the array's axes run to the patient's left, to posterior, to superior",
        ),
        ("spacing", spacing),
        ("field of view", "the source's, nothing is cropped"),
        ("headers", "written anew, with no text of the source's"),
        ("names", names),
    ]


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve())


def _select(plan: Plan, corpus: Corpus, arguments: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows to build, and all that is left out before any scan is read."""
    rows, excluded = plan.rows, list(plan.excluded)
    rules: list[tuple[str, Callable[[dict], bool]]] = []
    if arguments.exclude:
        listed = {line.strip().removesuffix(".nii.gz") for line in arguments.exclude.read_text().splitlines()}
        rules.append(("listed in --exclude", lambda row: row["volume_name"] in listed))
    if arguments.present_only:
        rules.append(("not in the local copy", lambda row: not corpus.exists(row["file"])))
    for reason, applies in rules:
        left_out = [row for row in rows if applies(row)]
        excluded += [exclusion(row, reason) for row in left_out]
        rows = [row for row in rows if not applies(row)]
    if arguments.volumes == "reference" and any(INSIDE in row["file"] for row in rows):
        raise SystemExit(
            "--volumes reference needs scans that are files: unpack the archives, or use --volumes nifti."
        )
    return rows, excluded


def _without_names(plan: Plan, rows: list[dict], excluded: list[dict], output: Path) -> tuple[Plan, list, list]:
    """Rows, exclusions and questions with pseudonyms; which volume is which file is written beside the dataset."""
    name = pseudonyms(output)
    renamed = [without_names(row, name) for row in rows]
    key = output.with_name(f"{output.name}.names.csv")
    kept = ("file", "study_id", "patient_id")
    pairs = zip(renamed, rows, strict=True)
    table = [{"volume_name": new["volume_name"], **{name: old[name] for name in kept}} for new, old in pairs]
    _write_table(key, table, ("volume_name", *kept))
    key.chmod(0o600)
    questions = plan.questions and (lambda: (without_names(question, name) for question in plan.questions()))
    return replace(plan, questions=questions), renamed, [without_names(row, name) for row in excluded]


def _report_rows(rows: list[dict], split: str, arguments: argparse.Namespace) -> Iterator[dict]:
    """The rows that were built, without the scans but with their places."""
    for shard in split_into_shards([row for row in rows if row["split"] == split], arguments.shard_rows):
        path = shard_path(arguments.output, shard.name, arguments.volumes)
        for number, row in enumerate(read_rows(path, without="volume" if arguments.volumes == "nifti" else None)):
            place = {"volume": f"volumes/{path.name}#{number}"} if arguments.volumes == "nifti" else {}
            yield {**row, **place}


def _write_questions(output: Path, plan: Plan, reports: dict[str, list[dict]]) -> dict[str, int]:
    """The questions about the volumes that are there, a file a split; how many of each type."""
    counts: dict[str, int] = {}
    for split, group in reports.items():
        studies = {row["volume_name"]: {name: row[name] for name in ("study_id", "patient_id")} for row in group}
        questions = (
            {**question, **studies[question["volume_name"]]}
            for question in plan.questions()
            if question["volume_name"] in studies
        )
        write_rows(output / f"vqa/{split}.parquet", _counted(questions, counts, split), QUESTION_FEATURES, 10_000)
    return counts


def _counted(questions: Iterable[dict], counts: dict[str, int], split: str) -> Iterator[dict]:
    counts[split] = 0
    for question in questions:
        counts[split] += 1
        yield question


def _write_table(path: Path, rows: list[dict[str, str]], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
