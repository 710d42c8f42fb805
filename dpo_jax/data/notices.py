"""Lines about a set of pairs that a user should read before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.columns import named
from dpo_jax.data.dataset import PairSet
from dpo_jax.data.templates import excerpt
from dpo_jax.types import counted, listed

T = TypeVar("T")


def left_out(name: str, report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each kind of text that was left out of a set, and one for answers that end more than once.

    Args:
      name: of the set.
      report: of the set, see `dataset.load`.
    """
    lines = [
        f"{name}: the model does not get all of the text: {entry['part']} in {counted(entry['count'], entry['side'])} "
        f"is left out, such as {excerpt(entry['text'])} at {entry['place']}"
        for entry in report["omitted"]
    ]
    if report["inner_ends"]:
        lines.append(
            f"{name}: {report['inner_ends']} answers hold the token that ends an answer inside their text; "
            "a model trained on them may stop there"
        )
    return lines


def unread(name: str, report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each list of columns, and of keys of messages, that nothing reads, with the sources of both.

    Args:
      name: of the set.
      report: of the set, see `dataset.load`.
    """
    columns = _by_value(report["sources"], lambda source: tuple(source["unread"]))
    keys = _by_value(report["sources"], lambda source: tuple(source["unread_keys"]))
    return [
        f"{name}: nothing reads the columns {named(names)} of {files}; if one should be used, map it, as in "
        '--config.data.columns="prompt=COLUMN"'
        for names, files in columns.items()
        if names
    ] + [
        f"{name}: neither dpo_jax nor the chat template reads the keys {named(names)} of the messages of {files}"
        for names, files in keys.items()
        if names
    ]


def _by_value(sources: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], T]) -> dict[T, str]:
    """Groups sources by a value; returns their names, a few of them, for each."""
    names: dict[T, list[str]] = {}
    for source in sources:
        names.setdefault(value(source), []).append(source["name"])
    return {key: listed(each) for key, each in names.items()}


def untemplated(name: str, pairs: PairSet, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns a line for sources of text, if the tokenizer has a chat template that it may have been meant for.

    A first prompt with special tokens shows that a template wrote the text before.

    Args:
      name: name of the set, for the lines.
    """
    if tokenizer.chat_template is None:
        return []
    added = {*cast(Any, tokenizer).get_added_vocab().values()} - {cast(Any, tokenizer).bos_token_id}
    plain = [
        source
        for index, source in enumerate(pairs.report["sources"])
        if source["pairs"]
        and not source["templated"]
        and not added & {*pairs[int(np.searchsorted(pairs.source, index))].prompt.tolist()}
    ]

    def remedy(source: Mapping[str, Any]) -> str:
        if source["format"] in ("plain", "hh"):
            return "give --config.data.format=chat"
        return "write messages in place of text, or add a column 'system'"

    return [
        f"{name}: {files} is text, and the model's chat template is not applied; to apply it, {how}"
        for how, files in _by_value(plain, remedy).items()
    ]
