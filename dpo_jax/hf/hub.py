"""Uploads exports to the Hugging Face Hub."""

from __future__ import annotations

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from dpo_jax.hf import folders
from dpo_jax.runtime import reading
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError, listed

FIELD = "config.export.push_to_hub"


def check_access(repo: str) -> None:
    """Raises InputError unless the Hub knows who is logged in, and they own the namespace of a repository.

    Args:
      repo: id of a model repository, `owner/name`, or `name` in the namespace of who is logged in.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        who = huggingface_hub.HfApi().whoami()
    except HFValidationError as error:
        raise InputError(
            FIELD, got=f"{repo!r} ({error})", expected="the id of a model, owner/name", remedy="Correct it."
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            FIELD,
            got=f"{repo!r}, and the Hub does not say who is logged in ({' '.join(str(error).split()):.200})",
            expected="a login that may write there",
            remedy="Run `hf auth login`, set HF_TOKEN, or leave the field empty.",
        ) from error
    owner = repo.partition("/")[0] if "/" in repo else who["name"]
    owners = [who["name"], *(each["name"] for each in who.get("orgs", ()))]
    if owner not in owners:
        raise InputError(
            FIELD,
            got=f"{repo!r}, while {who['name']} is logged in",
            expected=f"a repository of {listed(owners)}",
            remedy="Correct the owner, or log in as them with `hf auth login`.",
        )


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads an export in one commit, in place of an earlier one; returns its address on the Hub.

    Args:
      folder: of an export; one in a bucket is copied to the cache first.
      private: whether a repository that does not exist yet is made private.
    Raises: InputError, which says how to upload it by hand, if the Hub refuses. The export stays as it is.
    """
    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=reading.copied(folder),
            commit_message="Upload by dpo_jax",
            delete_patterns=["*.safetensors", *folders.SMALL_FILES],  # also of the other kind, adapters or whole
        )
    except Exception as error:  # connection, Hub and disk raise many types, and what was trained is not to be lost
        raise InputError(
            FIELD,
            got=f"{repo!r}, and the upload failed ({' '.join(str(error).split()):.300})",
            expected="a repository that can be written to",
            remedy=f"The export is whole in {folder}. Upload it, or a copy of it on disk, with "
            f"`hf upload {repo} {folder}{' --private' * private}`.",
        ) from error
    return str(made)
