# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Whether there is something to load in a folder or on the Hub, asked before anything is loaded.

Libraries take a folder that is missing for the name of a repository, and speak of that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME


Answer = TypeVar("Answer")


def check_model_source(source: str | Path, *, revision: str | None = None, what: str = "model") -> None:
    """
    Args:
        source (`str` or `Path`): folder or Hub id OWNER/NAME.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        what (`str`): what the error calls it; it does not repeat the source, which may be a path.

    Raises:
        ValueError: nothing can be loaded from there, and why.
    """
    if Path(source).is_dir():
        check_model_folder(source, what=what)
        return
    _check_hub_id(source, what)
    # What is in the cache loads without a network too.
    if not isinstance(try_to_load_from_cache(str(source), CONFIG_NAME, revision=revision), str):
        address = hf_hub_url(str(source), CONFIG_NAME, revision=revision)
        _ask_hub(lambda: get_hf_file_metadata(address), what)


def check_model_folder(folder: str | Path, *, what: str = "model") -> None:
    """As [`check_model_source`], for what lies here."""
    if not Path(folder).is_dir():
        raise ValueError(f"{what}: there is no such folder.")
    if not (Path(folder) / CONFIG_NAME).exists():
        raise ValueError(f"{what}: the folder has no {CONFIG_NAME}, so no model was saved there.")


def dataset_revision(repo_id: str) -> str:
    """The newest commit of a dataset on the Hub; errors as those of [`check_model_source`]."""
    _check_hub_id(repo_id, "dataset")
    return _ask_hub(lambda: HfApi().dataset_info(repo_id).sha, "dataset")


def _check_hub_id(source: str | Path, what: str) -> None:
    try:
        validate_repo_id(str(source))
        is_hub_id = "/" in str(source)
    except HFValidationError:
        is_hub_id = False
    if not is_hub_id:
        raise ValueError(f"{what}: there is no such folder, and it is no Hub id OWNER/NAME.")


def _ask_hub(request: Callable[[], Answer], what: str) -> Answer:
    try:
        return request()
    except GatedRepoError:
        reason = "its authors let in only who accepts their terms: do so on its page, and log in with `hf auth login`."
    except RepositoryNotFoundError:
        reason = (
            f"there is no such folder, and the Hub shows you no {what} of that name: check the name, or for a private "
            "one log in with `hf auth login`."
        )
    except RevisionNotFoundError:
        reason = "its repository on the Hub has no such revision."
    except EntryNotFoundError:
        reason = f"its repository on the Hub has no {CONFIG_NAME}, so it is no model."
    except (HTTPError, OSError) as error:  # of the network, or HF_HUB_OFFLINE
        reason = (
            "there is no such folder, and as a Hub id it is not in the cache, nor did the Hub answer "
            f"({type(error).__name__})."
        )
    raise ValueError(f"{what}: {reason}")
