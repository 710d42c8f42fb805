"""Lines about a set of pairs that a user should read before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.columns import named
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.templates import excerpt


def left_out(name: str, report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each kind of text that was left out of a set, and one for answers that end more than once.

    Args:
      name: of the set.
      report: of the set, see `dataset.load`.
    """
    lines = [
        f"{name}: the model does not get all of the text: {entry['part']} in {entry['count']} {entry['side']} is "
        f"left out, such as {excerpt(entry['text'])} at {entry['place']}"
        for entry in report["omitted"]
    ]
    if report["inner_ends"]:
        lines.append(
            f"{name}: {report['inner_ends']} answers hold the token that ends an answer inside their text; "
            "a model trained on them may stop there"
        )
    return lines


def unread(name: str, report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each source of a set with columns that nothing reads."""
    return [
        f"{name}: nothing reads the columns {named(source['unread'])} of {source['name']}; if one holds a part of the "
        'preferences, say which, as in --config.data.columns="prompt=COLUMN"'
        for source in report["sources"]
        if source["unread"]
    ]


def untemplated(name: str, pairs: PairSet, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One line for each source of text, if the tokenizer has a chat template that it may have been meant for.

    A first prompt with special tokens shows that a template wrote the text before.

    Args:
      name: name of the set, for the lines.
    """
    if tokenizer.chat_template is None:
        return []
    added = {*cast(Any, tokenizer).get_added_vocab().values()} - {cast(Any, tokenizer).bos_token_id}
    lines = []
    for index, source in enumerate(pairs.report["sources"]):
        first = int(np.searchsorted(pairs.source, index))
        if source["pairs"] and not source["templated"] and not added & {*pairs[first].prompt.tolist()}:
            pairs_of_text = source["format"] in ("plain", "hh")
            how = "give --config.data.format=chat" if pairs_of_text else "write messages in place of text"
            lines.append(
                f"{name}: {source['name']} is text, and the model's chat template is not applied; to apply it, {how}"
            )
    return lines
