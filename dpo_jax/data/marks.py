"""Marks of answer tokens that are read but not scored, such as a user's turn inside an answer.

A token id i is not negative; in an answer it is scored. Stored as ~i, which is -1 - i, the same token is context only:
later tokens attend to it, and no log-prob of it counts. Prompts have no marks, because none of their tokens is scored.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def mark(ids: Int[np.ndarray, "n"], scored: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Marks the ids that are not scored."""
    return np.where(scored, ids, ~ids)


def unmark(marked: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Returns the ids without marks."""
    return np.where(marked < 0, ~marked, marked)


def is_scored(marked: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Returns which tokens are scored."""
    return marked >= 0


def count_scored(marked: Int[np.ndarray, "n"]) -> int:
    """Returns the number of scored tokens."""
    return int(np.count_nonzero(marked >= 0))
