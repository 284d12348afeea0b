# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What of a folder goes to the Hub: an allow-list, after checks that it is whole and says nothing that should stay."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard

from hsenet.card_checks import check_dataset_card, check_model_card
from hsenet.card_marks import put_sections, sections_of
from hsenet.cards import write_model_card
from hsenet.confidential import Confidential
from hsenet.dataset_usage import SECTION, loading_section
from hsenet.fingerprint import FILE as FINGERPRINT
from hsenet.fingerprint import fingerprint_problem, weight_hashes
from hsenet.model_folder import CARD, MODEL_FILES, matches, model_problems
from hsenet.run_record import publishable


DATASET_FILES = (
    CARD,
    "LICENSE*",
    "excluded.csv",
    "leakage.json",
    "reports/*.parquet",
    "vqa/*.parquet",
    "volumes/*.parquet",
    "preview/*.parquet",
)
PHANTOM_FILES = ("volumes/*/*.nii.gz", "masks/*/*.nii.gz")  # drawn, nobody's scans
MAX_FILES = 20_000  # the Hub takes 25,000 in a commit


class PublishingError(ValueError):
    """Nothing was changed on the Hub, and the message says what to do."""


@dataclass
class Publication:
    """
    Args:
        files: path in the repository to the file or its content.
        left_out: paths in the folder of what stays here.
        patterns: which files of the repository are ours: those that are not among `files` any more are deleted.
    """

    files: dict[str, Path | bytes]
    left_out: list[str]
    patterns: tuple[str, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size for content in self.files.values()
        )


def model_publication(
    folder: str | Path,
    repo_id: str,
    evaluation: str | Path | None = None,
    identifiers: Iterable[str | Path] = (),
) -> Publication:
    """
    What [`~hsenet.publishing.push_model`] sends; nothing is asked of the Hub.

    Raises:
        [`PublishingError`]: the folder is incomplete, or says what it must not.
    """
    folder = _folder(folder)
    _refuse(model_problems(folder), "The model is not complete")
    publication = _collect(folder, MODEL_FILES)
    if evaluation is not None:
        publication.files |= _evaluation_files(Path(evaluation))
    known = Confidential.around(folder, repo_id.split("/"), map(Path, identifiers))
    _refuse_leaks(publication.files, known)
    _refuse_other_fingerprint(folder)
    publication.files[CARD] = _card(publication, repo_id, evaluation)
    _refuse_leaks({CARD: publication.files[CARD]}, known)
    return publication


def dataset_publication(folder: str | Path, repo_id: str, identifiers: Iterable[str | Path] = ()) -> Publication:
    """As [`model_publication`], for [`~hsenet.publishing.push_dataset`]."""
    from hsenet.corpora.shards import LINK  # needs datasets, which models do without

    folder = _folder(folder)
    if (folder / LINK).is_symlink():
        raise PublishingError(
            "The rows of this dataset point into a local copy of the corpus and are of no use on the Hub: build it "
            "with --volumes nifti."
        )
    build = folder / "build.json"
    is_phantom = build.exists() and "generator_version" in json.loads(build.read_text())
    publication = _collect(folder, DATASET_FILES + (PHANTOM_FILES if is_phantom else ()))
    _refuse(_dataset_problems(folder, publication), "The dataset is not complete")
    known = Confidential.around(folder, repo_id.split("/"), map(Path, identifiers))
    _refuse_leaks(publication.files, known, scans_may_be_named=True)
    publication.files[CARD] = _dataset_card(folder, repo_id)
    return publication


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishingError("There is no such folder to publish.")
    return folder


def _collect(folder: Path, patterns: tuple[str, ...]) -> Publication:
    files, left_out = {}, []
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            name = path.relative_to(folder).as_posix()
            if matches(name, patterns):
                files[name] = path
            else:
                left_out.append(name)
    if len(files) > MAX_FILES:
        raise PublishingError(
            f"{len(files)} files are more than the {MAX_FILES} that go into one commit: build it with larger shards."
        )
    return Publication(dict(sorted(files.items())), sorted(left_out), patterns)


def _card(publication: Publication, repo_id: str, evaluation: str | Path | None) -> bytes:
    """The card that describes these files and keeps what people wrote; made among links: the folder stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in publication.files.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                place.write_bytes(content)
            elif name == CARD:
                shutil.copyfile(content, place)
            else:
                place.symlink_to(content.resolve())
        try:
            content = write_model_card(folder, repo_id=repo_id, evaluation=evaluation).read_bytes()
        except (ValueError, FileNotFoundError) as error:
            raise PublishingError(f"The card cannot be written: {error}") from error
    _refuse([f"the card: {problem}" for problem in check_model_card(content.decode())], "The card is not complete")
    return content


def _dataset_card(folder: Path, repo_id: str) -> bytes:
    """The folder's card, with a snippet that loads the dataset from where it will be."""
    text = (folder / CARD).read_text(encoding="utf-8-sig")
    if SECTION in sections_of(text):
        section = loading_section(DatasetCard(text).data.configs, repo_id=repo_id)
        text = put_sections(text, {SECTION: section})
    problems = check_dataset_card(text)
    _refuse(
        [f"the card: {problem}" for problem in problems], "The card is not complete (building again writes it anew)"
    )
    return text.encode()


def _evaluation_files(folder: Path) -> dict[str, Path | bytes]:
    if not (folder / "metrics.json").is_file():
        raise PublishingError(
            "The evaluation has no metrics.json: expected the output directory of train/evaluate.py."
        )
    metrics = publishable(json.loads((folder / "metrics.json").read_text()))
    return {"metrics.json": json.dumps(metrics, indent=2).encode(), "table.md": folder / "table.md"}


def _refuse_other_fingerprint(folder: Path) -> None:
    """One that does not say whose it is goes: the card says so."""
    if not (folder / FINGERPRINT).exists():
        return
    stored = json.loads((folder / FINGERPRINT).read_text())
    if "weights" in stored and (problem := fingerprint_problem(stored, weight_hashes(folder))):
        raise PublishingError(
            f"The stored fingerprint {problem}, so nothing was uploaded: store it anew with `hsenet fingerprint DIR` "
            f"if you trust the weights, or delete {FINGERPRINT}."
        )


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        raise PublishingError(f"{what}, so nothing was uploaded: {'; '.join(problems)}.")


def _refuse_leaks(files: dict[str, Path | bytes], known: Confidential, *, scans_may_be_named: bool = False) -> None:
    found = []
    for name, content in files.items():
        if not name.endswith(".py"):  # the package's own, to the byte
            kinds = known.found_in(name, content, scans_may_be_named=scans_may_be_named)
            found += [f"{name} holds {kind}" for kind in kinds]
    _refuse(found, "Something would leave this machine that should not")


def _dataset_problems(folder: Path, publication: Publication) -> list[str]:
    """Every file that the card's configurations name is there."""
    if CARD not in publication.files:
        return ["there is no README.md, which a finished build writes last: build it to its end"]
    try:
        configs = DatasetCard.load(folder / CARD).data.to_dict().get("configs")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        return [f"the metadata of README.md cannot be read: {error}"]
    if not configs:
        return ["the card has no configs: expected a folder that a program of datasets_scripts/ has built"]
    named = [entry["path"] for config in configs for entry in config["data_files"]]
    missing = [path for path in named if not any(matches(name, (path,)) for name in publication.files)]
    return [f"the card names {path}, and there is no such file" for path in missing]
