# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Models and datasets to the Hub: what goes, what must not, and one commit for all of it.

    push_model("outputs/stage3", "your-name/hsenet-reports")           # private
    push_dataset("data/ct_rate", "your-name/ct-rate-hsenet")

Everything is checked here before the Hub is asked anything: the folder is complete and loads, and no file says what
should stay on this machine. The commit then holds all changes at once, on top of the state that was looked at: the
repository is what it was or what it should be, never a mixture. Files that a failed upload has brought there already
are not sent again.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hsenet.cards import check_model_card, write_model_card
from hsenet.confidential import Confidential
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


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    evaluation: str | Path | None = None,
    identifiers: Iterable[str | Path] = (),
) -> CommitInfo:
    """
    Args:
        folder: that `save_pretrained` of model and processor wrote, or a training program. It stays as it is.
        repo_id (`str`): `OWNER/NAME`; made if it does not exist.
        private (`bool`):
            Of a repository that is made; one that exists keeps its visibility. Nothing goes to a public one unless
            `private=False`.
        revision (`str`, *optional*): a branch, made if it does not exist; "main" without.
        token (`str`, *optional*): else the one of `hf auth login` or HF_TOKEN.
        evaluation: the output directory of `train/evaluate.py`; `metrics.json` and `table.md` go, without paths.
        identifiers:
            Files with identifiers that nothing published may hold, one a line, beside those of `*.names.csv` in and
            beside the folder.

    Returns:
        `CommitInfo`: its `oid` is the revision to pin.

    Raises:
        [`PublishingError`]: the folder is incomplete or says what it must not, or the Hub refuses.
    """
    publication = model_publication(folder, repo_id, evaluation, identifiers)
    return publish(
        publication, repo_id, private=private, revision=revision, token=token, commit_message=commit_message
    )


def push_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload dataset",
    identifiers: Iterable[str | Path] = (),
) -> CommitInfo:
    """As [`push_model`], of a folder that a program of `datasets_scripts/` has written."""
    publication = dataset_publication(folder, repo_id, identifiers)
    return publish(
        publication,
        repo_id,
        repo_type="dataset",
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message,
    )


def model_publication(
    folder: str | Path,
    repo_id: str,
    evaluation: str | Path | None = None,
    identifiers: Iterable[str | Path] = (),
) -> Publication:
    """What [`push_model`] would send; nothing is asked of the Hub."""
    folder = _folder(folder)
    _refuse(model_problems(folder), "The model is not complete")
    publication = _collect(folder, MODEL_FILES)
    if evaluation is not None:
        publication.files |= _evaluation_files(Path(evaluation))
    known = Confidential.around(folder, repo_id.split("/"), map(Path, identifiers))
    _refuse_leaks(publication.files, known)
    publication.files[CARD] = _card(publication, repo_id, evaluation)
    _refuse_leaks({CARD: publication.files[CARD]}, known)
    return publication


def dataset_publication(folder: str | Path, repo_id: str, identifiers: Iterable[str | Path] = ()) -> Publication:
    """What [`push_dataset`] would send; nothing is asked of the Hub."""
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
    return publication


def publish(
    publication: Publication,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """One commit that makes of our files in the repository what `publication` holds; others' are left alone."""
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}|refs/.*", revision):
        raise PublishingError("revision should be the name of a branch: commits stay what they are.")
    api = open_repository(repo_id, repo_type=repo_type, private=private, token=token)
    if revision is not None:
        _asking(repo_id, lambda: api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))
    there = _asking(repo_id, lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
    operations = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
    gone = [file.rfilename for file in there.siblings if file.rfilename not in publication.files]
    operations += [CommitOperationDelete(name) for name in gone if matches(name, publication.patterns)]
    return _asking(
        repo_id,
        lambda: api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
            parent_commit=there.sha,
        ),
    )


def open_repository(
    repo_id: str, *, repo_type: str = "model", private: bool = True, token: str | None = None
) -> HfApi:
    """
    The client of a repository that takes our commit: it exists now, and this user may write to it. Programs that work
    for hours before they publish call it first.

    Raises:
        [`PublishingError`]: with the remedy.
    """
    check_repo_id(repo_id)
    if token is None and get_token() is None:
        raise PublishingError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    _asking(repo_id, lambda: _check_login(api))
    _asking(repo_id, lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
    _asking(repo_id, lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
    if private and not _asking(repo_id, lambda: api.repo_info(repo_id, repo_type=repo_type)).private:
        raise PublishingError(
            f"{repo_id} exists and is public, and nothing is published unless you say so: ask for a public push, make "
            "the repository private in its settings, or choose another name."
        )
    return api


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise PublishingError(
            f"Expected a repository's name as OWNER/NAME, of letters, digits, '-', '_' and '.', got {repo_id!r}."
        )


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
    """The card that describes these files, and keeps what people wrote; made among links, so that no folder changes."""
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


def _evaluation_files(folder: Path) -> dict[str, Path | bytes]:
    if not (folder / "metrics.json").is_file():
        raise PublishingError(
            "The evaluation has no metrics.json: expected the output directory of train/evaluate.py."
        )
    metrics = publishable(json.loads((folder / "metrics.json").read_text()))
    return {"metrics.json": json.dumps(metrics, indent=2).encode(), "table.md": folder / "table.md"}


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
    configs = DatasetCard.load(folder / CARD).data.to_dict().get("configs")
    if not configs:
        return ["the card has no configs: expected a folder that a program of datasets_scripts/ has built"]
    named = [entry["path"] for config in configs for entry in config["data_files"]]
    missing = [path for path in named if not any(matches(name, (path,)) for name in publication.files)]
    return [f"the card names {path}, and there is no such file" for path in missing]


def _check_login(api: HfApi) -> None:
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise PublishingError(
                "The Hub does not accept your token: run `hf auth login` again, or set HF_TOKEN anew."
            ) from error
        raise
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishingError("Your token may only read: make one that may write, at hf.co/settings/tokens.")


def _asking(repo_id: str, request: Callable[[], Any]) -> Any:
    """The Hub's answer; its refusals and those of the network in words."""
    try:
        return request()
    except OfflineModeIsEnabled as error:
        raise PublishingError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.") from error
    except HTTPError as error:
        raise PublishingError(_in_words(repo_id, error)) from error
    except RuntimeError as error:  # what the client makes of a large file's failed upload
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise PublishingError(_in_words(repo_id, error.__cause__)) from error


def _in_words(repo_id: str, error: HTTPError) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The Hub did not answer ({type(error).__name__}). {repo_id} is as it was or, if only the last answer was "
            "lost, as it should be: push again; what has arrived is not sent twice."
        )
    status, said = error.response.status_code, error.server_message or str(error)
    if status in (409, 412):
        return f"Somebody has just changed {repo_id}, so nothing was uploaded: look at it, and push again."
    if status in (401, 403, 404):
        return (
            f"The Hub does not let you write to {repo_id} ({status}, {said}): is the owner's name right, and may your "
            "token write there?"
        )
    return f"The Hub refused {repo_id} ({status}): {said}"
