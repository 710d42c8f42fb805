"""Special tokens of a tokenizer beside the ids that a model's files name: what does not fit, as warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.dataset import PairSet
from dpo_jax.data.tokenize import named

_TAIL = 4  # tokens at the end of an answer among which one ends it: templates write a line break after it
_LOOKED_AT = 1_000  # pairs of a set: it may be larger than memory, and a template ends every answer alike


def disagreements(
    tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> list[str]:
    """Where a tokenizer and a model differ that can still be trained together, a line each.

    Args:
      vocab_size: of the model. No text that was tokenized may have used an id from there on.
      config, generation: contents of its `config.json` and `generation_config.json`; empty where there is none.
    """
    found = []
    tokens = set(tokenizer.get_vocab().values())
    if beyond := sorted(i for i in tokens if i >= vocab_size):
        found.append(
            f"the tokenizer has {len(tokens)} tokens and the model's vocab_size is {vocab_size}; no text uses "
            f"{named(tokenizer, beyond)}"
        )
    ours, theirs = _ids(tokenizer.bos_token_id), _ids(config.get("bos_token_id"))
    if _differ(ours, theirs, tokens):
        found.append(
            f"bos_token_id in config.json is {named(tokenizer, theirs)}; the tokenizer's own is "
            f"{named(tokenizer, ours) or 'none'}"
        )
    ours, (theirs, file) = _ids(tokenizer.eos_token_id), _stops(config, generation)
    if _differ(ours, theirs, tokens):
        found.append(
            f"eos_token_id in {file}, where generation stops, is {named(tokenizer, theirs)}; the tokenizer's own, "
            f"which ends answers in plain text, is {named(tokenizer, ours) or 'none'}"
        )
    return found


def unended(
    name: str,
    pairs: PairSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> list[str]:
    """A line if answers that were not cut end in nothing that stops generation, as a template may write them.

    Of each pair the first answer that is there is looked at, which is the chosen one if there is one.

    The tokenizer's own EOS counts as such an end: where the model's files lack it, `disagreements` says so.

    Args:
      name: of the set, for the line.
      max_length: that the pairs were cut to.
      The others: as for `disagreements`.
    """
    stops = sorted({*_stops(config, generation)[0], *_ids(tokenizer.eos_token_id)})
    looked_at = np.linspace(0, len(pairs) - 1, min(len(pairs), _LOOKED_AT)).astype(int).tolist()
    found = [(i, pair.prompt, next(filter(len, pair.answers), None)) for i in looked_at for pair in [pairs[i]]]
    tails = {
        i: answer[-_TAIL:]
        for i, prompt, answer in found
        if answer is not None and len(prompt) + len(answer) < max_length
    }
    endless = [i for i, tail in tails.items() if not np.isin(tail, stops).any()]
    if not stops or not endless:
        return []
    shown = tokenizer.decode(tails[endless[0]].tolist()[-2:])
    return [
        f"{len(endless)} of {len(tails)} answers looked at in {name} end in no token that stops generation "
        f"({named(tokenizer, stops)}); {pairs.place(endless[0])} ends in {shown!r}, which eos_token_id in "
        "generation_config.json could name"
    ]


def _differ(ours: list[int], theirs: list[int], tokens: set[int]) -> bool:
    """Whether the model names ids that are no tokens, or without the tokenizer's own among them."""
    return not {*theirs} <= tokens or bool(theirs and ours and ours[0] not in theirs)


def _stops(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[list[int], str]:
    """Ids that end generation, and the file that names them: transformers reads the first of the two that does."""
    for file, fields in (("generation_config.json", generation), ("config.json", config)):
        if ids := _ids(fields.get("eos_token_id")):
            return ids, file
    return [], ""


def _ids(value: object) -> list[int]:
    """An id or several, as they stand in JSON; empty for anything else, such as null."""
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]
