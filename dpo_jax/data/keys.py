"""What names a pair wherever something is stored for it: a digest of its token ids."""

from __future__ import annotations

import numpy as np
import xxhash

from dpo_jax.types import Encoded


def content_key(pair: Encoded) -> tuple[int, int]:
    """Digest of the token ids as two uint64: whatever is stored under it cannot reach another pair.

    Of answers that are not there, only those after the second make no difference: sets may have columns for more.
    """
    parts = pair.prompt, pair.chosen, pair.rejected, *(ids for ids in pair.others if len(ids))
    digest = xxhash.xxh3_128(np.array([len(ids) for ids in parts], np.int64).tobytes())
    for ids in parts:
        digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return divmod(digest.intdigest(), 1 << 64)
