"""Object stores, gs:// and s3://: how a path in a bucket is reached, and what goes wrong there in words for a user."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import posixpath
import re
from typing import TYPE_CHECKING, Any

from dpo_jax.types import InputError

if TYPE_CHECKING:
    from etils import epath

PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # schemes; the package that each needs, and its extra
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def scheme_of(text: str) -> str:
    """Returns the scheme of a text such as gs://bucket/key, in lower case; empty for a path on disk."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else ""


def path_of(text: str, place: str = "") -> epath.Path:
    """Returns the path of a text such as gs://bucket/key, with `.` and `..` in it resolved: stores know neither.

    Args:
      place: flag or field that names it, for errors.
    Raises: InputError for another scheme, a text without the name of a bucket, or if the store's package is missing.
    """
    scheme, (_, slashes, rest) = scheme_of(text), text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in PACKAGES or not slashes or not bucket.strip("."):
        raise InputError(
            place or text,
            got=f"{text!r}, which is no path that can be read or written here",
            expected="a path on disk, or one in a bucket as gs://BUCKET/PATH or s3://BUCKET/PATH",
            remedy="Correct it; other stores have to be mounted or copied first.",
        )
    _connect(scheme)
    from etils import epath

    key = posixpath.normpath(f"/{key}").lstrip("/")
    return epath.Path(f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}")


@functools.cache
def _connect(scheme: str) -> None:
    """Sets how stores of a scheme are reached. Raises: InputError if their package is missing."""
    package, extra = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{scheme}://",
            got=f"{package} is not installed",
            expected=f"the package that reads and writes {scheme}://",
            remedy=f"Run pip install 'dpo-jax[{extra}]'.",
        )
    settings: dict[str, object] = {"use_listings_cache": False}  # another process may have written since
    if scheme == "gs" and "STORAGE_EMULATOR_HOST" in os.environ:
        settings["token"] = "anon"
        # Read when gcsfs is first imported: it would look for a service over gRPC that emulators do not have.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    fsspec = importlib.import_module("fsspec")
    fsspec.config.conf[extra] = settings | fsspec.config.conf.get(extra, {})
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath would import TensorFlow, where that is installed


def filesystem(path: epath.Path) -> Any:
    """Returns the fsspec file system of a path, which is the one that epath uses."""
    return path._backend.fs(path)  # pyright: ignore[reportAttributeAccessIssue]


def refused(path: object, error: Exception, what: str) -> InputError:
    """Returns the error for a path in a bucket that the store refused to read or write."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        str(path),
        got=f"cannot be {what} ({type(error).__name__}: {reason:.300})",
        expected="a bucket that exists, with credentials that may read, write, list and delete in it",
        remedy="Check the bucket's name; for gs:// log in with `gcloud auth application-default login`, for s3:// set "
        "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )


def kvstore(path: str) -> dict[str, object]:
    """Returns tensorstore's address of s3://BUCKET/KEY, with the environment's endpoint, region and credentials.

    tensorstore's driver reads no AWS_ENDPOINT_URL, and asks the network for a region that is not named.
    """
    bucket, _, key = path.removeprefix("s3:").lstrip("/").partition("/")
    spec: dict[str, object] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec["endpoint"] = endpoint
    if region or endpoint:
        spec["aws_region"] = region or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec
