"""Warnings about special tokens: a tokenizer's against the ids in a model's files, and answers that never end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.dataset import PairSet
from dpo_jax.data.marks import unmark
from dpo_jax.data.tokenize import named

_TAIL = 4  # tokens at the end of an answer that may hold its stop token: templates write a line break after it
_SAMPLED = 1_000  # pairs of a set that are checked: it may exceed memory, and a template ends all answers alike


def disagreements(
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    config: Mapping[str, object],
    generation: Mapping[str, object],
) -> list[str]:
    """Differences between a tokenizer and a model that do not prevent training, one line each.

    Args:
      vocab_size: of the model; the tokenized texts have only ids below it.
      config, generation: contents of the model's `config.json` and `generation_config.json`; empty if missing.
    """
    lines = []
    tokens = set(tokenizer.get_vocab().values())
    if beyond := sorted(i for i in tokens if i >= vocab_size):
        lines.append(
            f"the tokenizer has {len(tokens)} tokens and the model's vocab_size is {vocab_size}: the data use none of "
            f"those beyond it, {named(tokenizer, beyond)}"
        )
    ours, theirs = _ids(tokenizer.bos_token_id), _ids(config.get("bos_token_id"))
    if _differ(ours, theirs, tokens):
        lines.append(
            f"bos_token_id in config.json is {named(tokenizer, theirs)}; the tokenizer's own is "
            f"{named(tokenizer, ours) or 'none'}"
        )
    ours, (theirs, file) = _ids(tokenizer.eos_token_id), _stops(config, generation)
    if _differ(ours, theirs, tokens):
        lines.append(
            f"eos_token_id in {file}, where generation stops, is {named(tokenizer, theirs)}; the tokenizer's own, "
            f"which ends answers in plain text, is {named(tokenizer, ours) or 'none'}"
        )
    return lines


def unended(
    name: str,
    pairs: PairSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    config: Mapping[str, object],
    generation: Mapping[str, object],
) -> list[str]:
    """One line if answers that were not truncated end without a token that stops generation; else none.

    A chat template may write such answers. One answer of each sampled pair is checked: the chosen one, or the first
    that is not missing. The tokenizer's own EOS counts as a stop token; `disagreements` says so if the model's files
    lack it.

    Args:
      name: name of the set, for the line.
      max_length: limit that the pairs were truncated to.
      tokenizer, config, generation: as for `disagreements`.
    """
    stops = sorted({*_stops(config, generation)[0], *_ids(tokenizer.eos_token_id)})
    sampled = np.linspace(0, len(pairs) - 1, min(len(pairs), _SAMPLED)).astype(int).tolist()
    first_answers = [(i, pair.prompt, next(filter(len, pair.answers), None)) for i in sampled for pair in [pairs[i]]]
    tails = {
        i: answer[-_TAIL:]
        for i, prompt, answer in first_answers
        if answer is not None and len(prompt) + len(answer) < max_length
    }
    endless = [i for i, tail in tails.items() if not np.isin(tail, stops).any()]
    if not stops or not endless:
        return []
    shown = tokenizer.decode(unmark(tails[endless[0]]).tolist()[-2:])
    return [
        f"{len(endless)} of {len(tails)} answers checked in {name} end in no token that stops generation "
        f"({named(tokenizer, stops)}); {pairs.place(endless[0])} ends in {shown!r}: a token there that ends answers "
        "belongs into eos_token_id of generation_config.json"
    ]


def _differ(ours: list[int], theirs: list[int], tokens: set[int]) -> bool:
    """Whether the model names ids that are no tokens, or names ids and not the tokenizer's own."""
    return not {*theirs} <= tokens or bool(theirs and ours and ours[0] not in theirs)


def _stops(config: Mapping[str, object], generation: Mapping[str, object]) -> tuple[list[int], str]:
    """Ids that end generation, and the file that names them: the first of the two that does, as in transformers."""
    for file, fields in (("generation_config.json", generation), ("config.json", config)):
        if ids := _ids(fields.get("eos_token_id")):
            return ids, file
    return [], ""


def _ids(value: object) -> list[int]:
    """Ids from a JSON value that is one id or a list of ids; empty for anything else, such as null."""
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]
