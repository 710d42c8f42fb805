"""Lines about a set of pairs that a user should read before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.templates import excerpt


def left_out(name: str, report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each kind of text that was left out of a set, and one for answers that end more than once.

    Args:
      name: of the set.
      report: of the set, see `dataset.load`.
    """
    lines = [
        f"{name}: lost on its way to the model: {entry['part']} in {entry['count']} {entry['side']}, such as "
        f"{excerpt(entry['text'])} at {entry['place']}"
        for entry in report["omitted"]
    ]
    if report["inner_ends"]:
        lines.append(
            f"{name}: {report['inner_ends']} answers hold the token that ends a sequence inside their text; "
            "a model trained on them may stop there"
        )
    return lines
