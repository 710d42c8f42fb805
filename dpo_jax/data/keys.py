"""Keys under which values of a pair are stored: digests of its token ids."""

from __future__ import annotations

import numpy as np
import xxhash

from dpo_jax.types import Encoded


def content_key(pair: Encoded) -> tuple[int, int]:
    """Digest of the token ids as two uint64, so that a value stored under it cannot be read for another pair.

    Missing answers after the second do not change the digest, because sets may have columns for longer rankings.
    """
    parts = pair.prompt, pair.chosen, pair.rejected, *(ids for ids in pair.others if len(ids))
    digest = xxhash.xxh3_128(np.array([len(ids) for ids in parts], np.int64).tobytes())
    for ids in parts:
        digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return divmod(digest.intdigest(), 1 << 64)
