"""Text to token ids: one rule for the boundary between prompt and answer, one for BOS and EOS, one for truncation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_jax.types import Encoded, InputError, Pair

TRUNCATIONS = ("keep_end", "keep_start", "error")

_NAMED = 5  # tokens that a message names

_DROP = 'Drop the row or set data.on_bad_row="skip".'


class Outcome(NamedTuple):
    """An encoded pair and what had to be done to it."""

    encoded: Encoded
    prompt_cut: int = 0  # tokens taken from the prompt
    answer_cuts: tuple[int, ...] = ()  # tokens taken from the end of each answer, its EOS among them
    boundary_split: bool = False  # prompt and answers would merge where they meet, so each was tokenized by itself


class Specials(NamedTuple):
    """Ids that plain text is given and templated text is not."""

    lead: list[int]  # what the tokenizer's own post-processing puts first, such as BOS; often nothing
    eos: int


class Parts(NamedTuple):
    """Token ids of one pair before truncation."""

    prompt: list[int]
    answers: tuple[list[int], ...]  # best first; empty for one that is not there
    split: bool  # the answers were tokenized by themselves
    lead: int  # ids at the start of the prompt that truncation keeps: BOS


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads a Hugging Face tokenizer from a folder or the Hub, without running code that comes with it.

    Raises: InputError if there is none, or none with a `tokenizer.json` or what transformers can turn into one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"tokenizer {path!r}",
            got=f"not loadable ({' '.join(str(error).split())})",
            expected="a folder or Hub id with tokenizer.json and tokenizer_config.json",
            remedy="Set tokenizer.path, or save a tokenizer there with save_pretrained.",
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {path!r}",
            got=f"{type(tokenizer).__name__}, which runs in Python",
            expected="a tokenizer.json for the `tokenizers` library",
            remedy="Convert it with transformers and save it with save_pretrained.",
        )
    return tokenizer


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of all that decides the ids of a text: `tokenizer` (vocabulary, rules, special ids) and `template`."""
    backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # calls leave these behind; encode uses neither
        backend.pop(state, None)
    return {
        "tokenizer": _digest([backend, tokenizer.special_tokens_map]),
        "template": _digest(tokenizer.chat_template),
    }


def named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens with their ids, for a message; the first ones of many."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    names = [f"{tokens[i]!r} (id {i})" if i in tokens else f"id {i}, which the tokenizer lacks" for i in ids[:_NAMED]]
    return ", ".join(names) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


def encode(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_length: int,
    max_prompt_length: int,
    truncate_prompt: str,
) -> list[Outcome | InputError]:
    """Token ids of each pair, or what is wrong with it.

    Boundary: prompt and answer are tokenized together and the prompt's own ids kept as the beginning; where a token
    would reach across the boundary of any answer, all are tokenized by themselves. An answer without text is not there
    and gets no token.

    Plain text starts with what the tokenizer itself puts first (BOS, for most that have one) and each answer ends in
    exactly one EOS; templated text gets neither, it has what its template wrote.

    Truncation, as in the original DPO: if the prompt and the longest answer exceed `max_length`, the prompt is cut to
    `max_prompt_length`, keeping a leading BOS; then each answer is cut to what is left. A cut answer has no EOS.

    Args:
      vocab_size: of the model; ids must be below it.
      max_length, max_prompt_length: tokens, 1 <= max_prompt_length < max_length.
      truncate_prompt: the end of a long prompt that survives, keep_end or keep_start; error: it is a bad row.
    Returns: per pair an Outcome, or an InputError if the prompt is too long under `error`, if prompt or answer has no
      token, if two answers are the same tokens once truncated, or if a pair that brings its reference is truncated.
    Raises: InputError for bad options, plain text without an EOS to end it, and ids the model does not have.
    """
    _check_options(max_length, max_prompt_length, truncate_prompt)
    outcomes: list[Outcome | InputError] = []
    for pair, parts in zip(pairs, _tokenized(pairs, tokenizer), strict=True):
        _check_ids(pair, parts, tokenizer, vocab_size)
        outcomes.append(_truncated(pair, parts, max_length, max_prompt_length, truncate_prompt))
    return outcomes


def _digest(value: object) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _check_options(max_length: int, max_prompt_length: int, truncate_prompt: str) -> None:
    if truncate_prompt not in TRUNCATIONS:
        raise InputError(
            "data.truncate_prompt",
            got=repr(truncate_prompt),
            expected=f"one of {', '.join(TRUNCATIONS)}",
            remedy="Correct it.",
        )
    if not 1 <= max_prompt_length < max_length:
        raise InputError(
            "data.max_prompt_length",
            got=f"{max_prompt_length} with data.max_length {max_length}",
            expected="at least 1 and less than data.max_length",
            remedy="Leave room for an answer.",
        )


def _specials(tokenizer: PreTrainedTokenizerBase, place: str, answer: str) -> Specials:
    """What plain text is given, told by an answer that has a token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            place,
            got="plain text, and a tokenizer without an eos_token",
            expected="a token that ends an answer",
            remedy="Set eos_token in the tokenizer's tokenizer_config.json, to the token that the model's config.json "
            "names by eos_token_id.",
        )
    (bare,) = _ids(tokenizer, [answer])
    dressed = cast("list[int]", tokenizer(answer, verbose=False)["input_ids"])
    start = next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
    return Specials(dressed[:start], cast(int, tokenizer.eos_token_id))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens, in one call: the tokenizer works through a list on several cores."""
    return cast(Any, tokenizer)(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _tokenized(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Parts]:
    together = iter(_ids(tokenizer, [p.prompt + text for p in pairs for text in ("", *filter(None, p.answers))]))
    bos = cast("int | None", tokenizer.bos_token_id)
    parts = [
        _parted(bos, next(together), [next(together) if answer else None for answer in pair.answers]) for pair in pairs
    ]
    apart = [i for i, part in enumerate(parts) if part.split]
    alone = iter(_ids(tokenizer, [text for i in apart for text in filter(None, pairs[i].answers)]))
    for i in apart:
        parts[i] = parts[i]._replace(answers=tuple(next(alone) if text else [] for text in pairs[i].answers))
    plain = (
        (pair.place, text)
        for pair, part in zip(pairs, parts, strict=True)
        for text, ids in zip(pair.answers, part.answers, strict=True)
        if ids and not pair.templated
    )
    first = next(plain, None)
    if first is None:
        return parts
    specials = _specials(tokenizer, *first)
    return [part if pair.templated else _dressed(part, specials) for pair, part in zip(pairs, parts, strict=True)]


def _parted(bos: int | None, prompt: list[int], wholes: Sequence[list[int] | None]) -> Parts:
    """Answers as what follows the prompt's ids in prompt and answer together; `split` where those do not start so."""
    size = len(prompt)
    answers = tuple([] if whole is None else whole[size:] for whole in wholes)
    split = any(whole is not None and whole[:size] != prompt for whole in wholes)
    return Parts(prompt, answers, split, lead=int(prompt[:1] == [bos]))


def _dressed(parts: Parts, specials: Specials) -> Parts:
    """BOS and EOS added, unless the text itself has them."""
    lead, eos = specials
    prompt = parts.prompt if parts.prompt[: len(lead)] == lead else lead + parts.prompt
    answers = tuple(answer if answer[-1:] in ([], [eos]) else [*answer, eos] for answer in parts.answers)
    return Parts(prompt, answers, parts.split, max(parts.lead, len(lead)))


def _check_ids(pair: Pair, parts: Parts, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    over = [ids for ids in (parts.prompt, *parts.answers) if max(ids, default=0) >= vocab_size]
    if over:
        raise InputError(
            pair.place,
            got=f"uses {named(tokenizer, sorted({i for ids in over for i in ids if i >= vocab_size}))}",
            expected=f"ids below {vocab_size}, the model's vocab_size",
            remedy="If tokens were added for this model, resize its embeddings with transformers' "
            "resize_token_embeddings and save it; if not, set tokenizer.path to the tokenizer it came with.",
        )


def _truncated(pair: Pair, parts: Parts, max_length: int, max_prompt: int, mode: str) -> Outcome | InputError:
    prompt, answers, split, lead = parts
    for name, there, ids in zip(("prompt", *_names(pair)), (True, *pair.answers), (prompt, *answers), strict=True):
        if there and not ids:
            return InputError(pair.place, got=f"{name!r} has no token", expected="at least one", remedy=_DROP)
    over = len(prompt) + max(map(len, answers)) > max_length
    if over and len(prompt) > max_prompt:
        if mode == "error":
            return InputError(
                pair.place,
                got=f"a prompt of {len(prompt)} tokens, in a pair longer than data.max_length {max_length}",
                expected=f"at most data.max_prompt_length {max_prompt}",
                remedy=f'Raise the limits, or set data.truncate_prompt="keep_end". {_DROP}',
            )
        prompt = _cut_prompt(prompt, lead, max_prompt, mode)
    room = max_length - len(prompt)
    encoded = Encoded.of(np.array(prompt, np.int32), *(np.array(ids[:room], np.int32) for ids in answers))
    prompt_cut = len(parts.prompt) - len(prompt)
    cuts = tuple(max(0, len(ids) - room) for ids in answers)
    if pair.reference and (prompt_cut or any(cuts)):
        return InputError(
            pair.place,
            got=f"reference log-probs of a pair that data.max_length {max_length} cuts here by "
            f"{prompt_cut + sum(cuts)} tokens",
            expected="those of the very tokens that are scored",
            remedy=f"Raise the limits, or take the reference columns away. {_DROP}",
        )
    if (same := _alike(encoded.answers)) is not None:
        which = "the answers" if len(answers) == 2 else "answers {} and {}".format(*same)
        after = f" after truncation to max_length {max_length}" if any(cuts) else ""
        return InputError(
            pair.place,
            got=f"{which} are the same tokens{after}",
            expected="answers that differ within the limit",
            remedy=f"Raise data.max_length. {_DROP}" if any(cuts) else _DROP,
        )
    return Outcome(encoded, prompt_cut, cuts, boundary_split=split)


def _names(pair: Pair) -> list[str]:
    """Of the answers, for errors."""
    return [f"answer {n}" for n, _ in enumerate(pair.answers, start=1)] if pair.others else ["chosen", "rejected"]


def _alike(answers: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """The first two answers of the same tokens, counted from 1."""
    seen: dict[bytes, int] = {}
    for n, ids in enumerate(answers, start=1):
        if (first := seen.setdefault(ids.tobytes(), n)) != n:
            return first, n
    return None


def _cut_prompt(prompt: list[int], lead: int, size: int, mode: str) -> list[int]:
    """The first `size` ids, or the `lead` first ones and the last ones."""
    first = size if mode == "keep_start" else min(lead, size)
    return prompt[:first] + prompt[len(prompt) - (size - first) :]
