"""Folders that a user names: on this machine, or by their id on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What `huggingface_hub` raises where a repository cannot be fetched. Most of it, a missing network too, is an OSError.
HUB_ERRORS = (OSError, HTTPError, EntryNotFoundError, HFValidationError)


def fetch(name: str | Path, what: str, *, expected: str, next_step: str, parts: Sequence[str], **download: Any) -> Path:
    """A folder on this machine, or the one that its parts from the Hub are downloaded to.

    Args:
        name: path, or id on the Hub.
        what: the setting that names it, such as `laq`; begins the message.
        expected: what should be there.
        next_step: ends the message.
        parts: patterns of the files to download.
        download: further arguments of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        ValueError: no such folder, and none that the Hub gives us; the message says why not.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(parts), **download))
    except HFValidationError:
        reason = "a file" if Path(name).is_file() else "which is no folder, and no id of the Hub either"
        cause = None
    except HUB_ERRORS as error:
        reason, cause = f"which is no folder; taken as a Hub id, {describe_hub_error(error)}", error
    raise ValueError(f"{what}: expected {expected}, got {name}, {reason}. Next step: {next_step}") from cause


def fetch_laq(name: str | Path, *, setting: str = "laq", parts: Sequence[str] = ("*.json", "*.safetensors")) -> Path:
    """The folder of a LAQ. Raises what `fetch` raises.

    Args:
        setting: that names it.
        parts: patterns of the files to download.
    """
    return fetch(
        name,
        setting,
        expected="the folder or Hub id of a LAQ",
        next_step="Give the folder that hlrp-laq-train wrote (its --output_dir), or user/repository on the Hub.",
        parts=parts,
    )


def describe_hub_error(error: Exception) -> str:
    """Why a repository cannot be fetched, as half a sentence."""
    if isinstance(error, GatedRepoError):
        return "it is there, but you have no access to it"
    if isinstance(error, RepositoryNotFoundError):
        return "it is not there either, or not yours to read"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE=1 forbids to look on the Hub"
    return f"it cannot be fetched ({shorten_error(error)})"


def shorten_error(error: Exception) -> str:
    """Kind and message of an error that was not meant for users, in one line of a few hundred characters at most."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"
