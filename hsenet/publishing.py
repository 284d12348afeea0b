# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Models and datasets to the Hub: what goes, what must not, and one commit for all of it.

    push_model("outputs/stage3", "your-name/hsenet-reports")           # private
    push_dataset("data/ct_rate", "your-name/ct-rate-hsenet")

Everything is checked here before the Hub is asked anything: the folder is complete and loads, and no file says what
should stay on this machine. The commit then holds all changes at once, on top of the state that was looked at: the
repository is what it was or what it should be, never a mixture. Files that a failed upload has brought there already
are not sent again.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hsenet.model_folder import matches
from hsenet.publication import Publication, PublishingError, dataset_publication, model_publication


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
    check_repo_id(repo_id)
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
    check_repo_id(repo_id)
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


def publish_space(
    publication: Publication, repo_id: str, variables: dict[str, str | None], *, private: bool = True
) -> CommitInfo:
    """One commit, after the Space's `variables` are set; those that are `None` are taken away."""
    api = open_repository(repo_id, repo_type="space", private=private)
    there = _asking(repo_id, lambda: api.get_space_variables(repo_id))
    for key, value in variables.items():
        if value is not None:
            _asking(repo_id, lambda key=key, value=value: api.add_space_variable(repo_id, key, value))
        elif key in there:
            _asking(repo_id, lambda key=key: api.delete_space_variable(repo_id, key))
    return publish(publication, repo_id, repo_type="space", private=private, commit_message="Upload page and package")


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
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    _asking(repo_id, lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk))
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
    except ValueError as error:  # what the client makes of a card that the Hub's validator refuses
        if "Invalid metadata" not in str(error):
            raise
        raise PublishingError(f"The Hub does not take the card, so nothing was uploaded: {error}") from error
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
