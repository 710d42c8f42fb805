"""TODO runtime.files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$DPO_JAX_CACHE/NAME`, or `dpo_jax/NAME` in the user's cache folder."""
    chosen = os.environ.get("DPO_JAX_CACHE")
    if chosen:
        return Path(chosen) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / name
