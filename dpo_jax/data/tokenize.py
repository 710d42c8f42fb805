"""Tokenizes pairs: rules for the boundary between prompt and answer, for BOS and EOS, and for truncation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_jax.data.written import lost_characters, untrimmed
from dpo_jax.runtime.terminal import waiting
from dpo_jax.types import Encoded, InputError, Omission, Pair

TRUNCATIONS = ("keep_end", "keep_start", "error")

_CONVERTING = ("sentencepiece", "protobuf", "tiktoken")  # packages that convert vocabularies for transformers

_NAMED = 5  # most tokens that a message names

_DROP = "Drop the row or give --config.data.on_bad_row=skip."


@dataclasses.dataclass(frozen=True)
class TokenizationRules:
    """Limits that token ids must keep, and how longer pairs are truncated; see `encode`."""

    vocab_size: int  # of the model; ids must be below it
    max_length: int  # tokens of prompt and one answer
    max_prompt_length: int  # tokens of a truncated prompt; at least 1 and below max_length
    truncate_prompt: str  # end of a long prompt that is kept, keep_end or keep_start; error: the pair is a bad row


class Outcome(NamedTuple):
    """An encoded pair, and what was truncated."""

    encoded: Encoded
    prompt_cut: int = 0  # tokens removed from the prompt
    answer_cuts: tuple[int, ...] = ()  # tokens removed from the end of each answer, including its EOS
    boundary_split: bool = False  # a token would have spanned prompt and answer, so they were tokenized separately
    exchanges_cut: int = 0  # exchanges dropped from the start of the prompt
    inner_ends: int = 0  # answers that hold more EOS than turns
    omissions: tuple[Omission, ...] = ()  # characters that the tokenizer has no token for


class TooLong(NamedTuple):
    """A pair that should lose an exchange of its prompt before it is truncated."""

    prompt_tokens: int


class SpecialTokens(NamedTuple):
    """Ids that are added to plain text and not to text that a chat template wrote."""

    prefix: list[int]  # ids that the tokenizer's post-processing puts first, such as BOS; often none
    eos: int
    ends: tuple[str, ...]  # texts of special tokens: an answer that ends in one has its end already


class Parts(NamedTuple):
    """Token ids of one pair before truncation."""

    prompt: list[int]
    answers: tuple[list[int], ...]  # best first; empty for a missing answer
    split: bool  # the answers were tokenized separately from the prompt
    prefix: int  # number of ids at the start of the prompt that truncation keeps: BOS and template prefix


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads a Hugging Face tokenizer from a folder or the Hub, without running code that comes with it.

    Raises: InputError if there is none, or none that has, or transformers can convert to, a `tokenizer.json`.
    """
    try:
        with waiting("loading tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise _not_loadable(path, " ".join(str(error).split())) from error
    # transformers makes a tokenizer of special tokens alone where a folder says its class and has no vocabulary.
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise _not_loadable(path, f"it has no tokens but {', '.join(tokenizer.all_special_tokens)}")
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {path!r}",
            got=f"{type(tokenizer).__name__}, which runs in Python",
            expected="a tokenizer.json for the `tokenizers` library",
            remedy="Convert it with transformers and save it with save_pretrained.",
        )
    return tokenizer


def _not_loadable(path: str, reason: str) -> InputError:
    """Returns the error for a tokenizer that transformers cannot load, with the packages that it needs if they miss."""
    folder = Path(path).expanduser()
    remedy = "Set --config.tokenizer.path, or save a tokenizer there with save_pretrained."
    if "trust_remote_code" in reason:
        reason = "its class comes with code of its own, which is never run"
        remedy = "Set --config.tokenizer.path to a folder with a tokenizer.json that this code has written."
    elif any(package in reason for package in _CONVERTING):
        # Without sentencepiece, transformers takes every file for one of tiktoken, and names that package instead.
        file = next(iter(sorted(folder.glob("*.model"))), None)
        of_tiktoken = file and re.match(rb"[\w+/=]+ \d+\n", file.read_bytes()[:200])
        packages = "tiktoken" if of_tiktoken else "sentencepiece protobuf"
        reason = "no vocabulary in this folder"
        if file or not folder.is_dir():
            reason = (
                f"{file.name if file else 'its vocabulary'} has to be converted by {' and '.join(packages.split())}"
            )
            remedy = f"Run `pip install {packages}`, or save a tokenizer.json where these are installed."
    return InputError(
        f"tokenizer {path!r}",
        got=f"not loadable ({reason})",
        expected="a folder or Hub id with tokenizer.json, or another vocabulary that transformers converts",
        remedy=remedy,
    )


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests that change with the ids of any text: `tokenizer` (vocabulary, rules, special ids) and `template`."""
    backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # calls of the tokenizer set these; encode uses neither
        backend.pop(state, None)
    return {
        "tokenizer": _digest([backend, tokenizer.special_tokens_map]),
        "template": _digest(tokenizer.chat_template),
    }


def named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Names tokens with their ids, for a message; at most the first five."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    names = [f"{tokens[i]!r} (id {i})" if i in tokens else f"id {i}, which the tokenizer lacks" for i in ids[:_NAMED]]
    return ", ".join(names) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


def encode(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenizationRules,
) -> list[Outcome | TooLong | InputError]:
    """Tokenizes pairs; returns, for each, its token ids or the error that makes it a bad row.

    Boundary: prompt and answer are tokenized together, and the ids after the prompt's own are the answer. If a token
    would span the boundary for any answer, the prompt and all its answers are tokenized separately. A missing answer
    has no tokens.

    Special tokens: plain text starts with the ids that the tokenizer itself puts first (usually BOS), and each answer
    ends in exactly one EOS; an answer that ends in a special token of its own, with or without blanks after it, keeps
    that one. Text that a chat template wrote has its special tokens already; none are added.

    Scored tokens: of an answer with `scored` ranges, the tokens in them; the others are marked, see `marks`, and those
    at its end are dropped. If a token would span the end of a range, the parts of the answer are tokenized separately.

    Truncation, as in the original DPO: if the prompt and the longest answer exceed `max_length`, the prompt is
    truncated to `max_prompt_length`, keeping a leading BOS; then each answer is truncated to the remaining length. A
    truncated answer has no EOS.

    Returns: an Outcome for each pair. TooLong in place of it where `truncate_prompt` is keep_end, the prompt would be
      truncated, and exchanges at its start could be dropped first. An InputError if the prompt is too long and
      `truncate_prompt` is error, if the prompt has no token or an answer no scored one, if two answers are the same
      tokens after truncation, or if a pair with reference log-probs of its own would be truncated.
    Raises: InputError for bad rules, plain text and a tokenizer without EOS, and ids that the model does not have.
    """
    _check_rules(rules)
    outcomes: list[Outcome | TooLong | InputError] = []
    eos = cast("int | None", tokenizer.eos_token_id)
    for pair, (parts, omissions) in zip(pairs, _tokenized(pairs, tokenizer), strict=True):
        _check_ids(pair, parts, tokenizer, rules.vocab_size)
        outcome = _truncate(pair, parts, rules)
        if isinstance(outcome, Outcome):
            turns = [len(spans) for spans in pair.scored] or [1] * len(parts.answers)
            inner = sum(eos is not None and ids.count(eos) > n for ids, n in zip(parts.answers, turns, strict=True))
            outcome = outcome._replace(omissions=omissions, inner_ends=inner)
        outcomes.append(outcome)
    return outcomes


def _digest(value: object) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _check_rules(rules: TokenizationRules) -> None:
    if rules.truncate_prompt not in TRUNCATIONS:
        raise InputError(
            "config.data.truncate_prompt",
            got=repr(rules.truncate_prompt),
            expected=f"one of {', '.join(TRUNCATIONS)}",
            remedy="Correct it.",
        )
    if not 1 <= rules.max_prompt_length < rules.max_length:
        raise InputError(
            "config.data.max_prompt_length",
            got=f"{rules.max_prompt_length} with data.max_length {rules.max_length}",
            expected="at least 1 and less than data.max_length",
            remedy="Leave room for an answer.",
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase, place: str, answer: str) -> SpecialTokens:
    """Special tokens of plain text, found by comparing an answer's ids with and without them.

    Args:
      place: of the answer, for errors.
      answer: text that has at least one token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            place,
            got="plain text, and a tokenizer without an eos_token",
            expected="a token that ends an answer",
            remedy="Set eos_token in the tokenizer's tokenizer_config.json, to the token that the model's config.json "
            "names by eos_token_id.",
        )
    (bare,) = _ids(tokenizer, [answer])
    with_special = cast("list[int]", tokenizer(answer, verbose=False)["input_ids"])
    start = next(i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare)
    added = cast(Any, tokenizer).added_tokens_decoder.values()
    ends = [token.content for token in added if token.special]
    return SpecialTokens(with_special[:start], cast(int, tokenizer.eos_token_id), (str(tokenizer.eos_token), *ends))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens, in one call: the tokenizer uses several cores for a list."""
    return cast(Any, tokenizer)(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _tokenized(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Parts, tuple[Omission, ...]]]:
    """Token ids of each pair, with special tokens and before truncation, and characters that they do not hold."""
    together = iter(_ids(tokenizer, [p.prompt + text for p in pairs for text in ("", *filter(None, p.answers))]))
    bos = cast("int | None", tokenizer.bos_token_id)
    parts = [
        _split_at_boundary(bos, next(together), [next(together) if answer else None for answer in pair.answers])
        for pair in pairs
    ]
    split = [i for i, part in enumerate(parts) if part.split]
    separate = iter(_ids(tokenizer, [text for i in split for text in filter(None, pairs[i].answers)]))
    for i in split:
        parts[i] = parts[i]._replace(answers=tuple(next(separate) if text else [] for text in pairs[i].answers))
    parts = [
        part._replace(answers=_scored_marked(tokenizer, pair, part)) if pair.scored else part
        for pair, part in zip(pairs, parts, strict=True)
    ]
    omissions = _omissions(pairs, parts, tokenizer)
    plain = (
        (pair.place, text)
        for pair, part in zip(pairs, parts, strict=True)
        for text, ids in zip(pair.answers, part.answers, strict=True)
        if ids and not pair.templated
    )
    first = next(plain, None)
    if first is not None:
        special = _special_tokens(tokenizer, *first)
        parts = [
            part if pair.templated else _with_special_tokens(pair, part, special)
            for pair, part in zip(pairs, parts, strict=True)
        ]
    return zip(parts, omissions, strict=True)


def _split_at_boundary(bos: int | None, prompt: list[int], wholes: Sequence[list[int] | None]) -> Parts:
    """Splits ids of prompt and answer into both; `split` is set if any do not start with the ids of the prompt alone.

    Args:
      wholes: ids of the prompt with each answer; None: the answer is missing.
    """
    size = len(prompt)
    answers = tuple([] if whole is None else whole[size:] for whole in wholes)
    split = any(whole is not None and whole[:size] != prompt for whole in wholes)
    return Parts(prompt, answers, split, prefix=int(prompt[:1] == [bos]))


def _scored_marked(tokenizer: PreTrainedTokenizerBase, pair: Pair, parts: Parts) -> tuple[list[int], ...]:
    """Ids of the answers, those outside of the pair's scored ranges marked and dropped from the end."""
    answers = []
    for text, ids, spans in zip(pair.answers, parts.answers, pair.scored, strict=True):
        before = "" if parts.split else pair.prompt
        encoded = cast(Any, tokenizer)(before + text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = untrimmed(encoded["offset_mapping"])[-len(ids) :] if ids else []
        offsets = [(a - len(before), b - len(before)) for a, b in offsets]
        inside = [any(a < end and b > begin for begin, end in spans) for a, b in offsets]
        if any(a < edge < b for a, b in offsets for span in spans for edge in span):
            edges = [0, *(edge for span in spans for edge in span), len(text)]
            pieces = _ids(tokenizer, [text[a:b] for a, b in itertools.pairwise(edges)])
            ids = [i for piece in pieces for i in piece]
            inside = [bool(number % 2) for number, piece in enumerate(pieces) for _ in piece]
        last = max((n for n, each in enumerate(inside, start=1) if each), default=0)
        answers.append([i if each else ~i for i, each in zip(ids[:last], inside, strict=False)])
    return tuple(answers)


def _holds_every_byte(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer works on bytes, has a token for each that UTF-8 uses, and leaves text as it is."""
    backend = cast(Any, tokenizer).backend_tokenizer
    bytewise = isinstance(backend.decoder, decoders.ByteLevel) and isinstance(backend.model, models.BPE)
    unchanged = backend.normalizer is None or isinstance(backend.normalizer, normalizers.NFC)
    used = set(pre_tokenizers.ByteLevel.alphabet()) - {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    return bytewise and unchanged and all(backend.token_to_id(letter) is not None for letter in used)


def _omissions(
    pairs: Sequence[Pair], parts: Sequence[Parts], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Omission, ...]]:
    """Characters of each pair that its tokens do not hold, found by decoding prompts and scored answer tokens."""
    if _holds_every_byte(tokenizer):
        return [()] * len(pairs)
    decode = cast(Any, tokenizer).backend_tokenizer.decode_batch
    ids = [ids for part in parts for ids in (part.prompt, *([i for i in each if i >= 0] for each in part.answers))]
    decoded = iter(decode(ids, skip_special_tokens=False))
    found = []
    for pair in pairs:
        scored = pair.scored or [((0, len(text)),) for text in pair.answers]
        texts = ["".join(text[a:b] for a, b in spans) for text, spans in zip(pair.answers, scored, strict=True)]
        lost = [(n, lost_characters(text, next(decoded))) for n, text in enumerate((pair.prompt, *texts), start=-1)]
        found.append(
            tuple(Omission("characters that the tokenizer has no token for", n, text) for n, text in lost if text)
        )
    return found


def _with_special_tokens(pair: Pair, parts: Parts, special: SpecialTokens) -> Parts:
    """Adds the prefix to the prompt and EOS to each answer, unless the text itself has them."""
    prefix, eos, ends = special
    prompt = parts.prompt if parts.prompt[: len(prefix)] == prefix else prefix + parts.prompt
    answers = tuple(
        ids if not ids or text.rstrip().endswith(ends) else [*ids, eos]
        for text, ids in zip(pair.answers, parts.answers, strict=True)
    )
    return Parts(prompt, answers, parts.split, max(parts.prefix, len(prefix)))


def _check_ids(pair: Pair, parts: Parts, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises InputError if the pair has ids that the model lacks."""
    lists = [ids for ids in (parts.prompt, *parts.answers) if ids]
    if any(max(ids) >= vocab_size or min(ids) <= ~vocab_size for ids in lists):
        over = {i for ids in lists for i in ids if not ~vocab_size < i < vocab_size}
        raise InputError(
            pair.place,
            got=f"uses {named(tokenizer, sorted(i if i >= 0 else ~i for i in over))}",
            expected=f"ids below {vocab_size}, the model's vocab_size",
            remedy="If tokens were added for this model, resize its embeddings with transformers' "
            "resize_token_embeddings and save it; if not, set --config.tokenizer.path to the tokenizer it came with.",
        )


def _truncate(pair: Pair, parts: Parts, rules: TokenizationRules) -> Outcome | TooLong | InputError:
    """Truncates a pair as `encode` says, or returns what keeps it from that."""
    prompt, answers, split, prefix = parts
    max_length, max_prompt = rules.max_length, rules.max_prompt_length
    for name, text, ids in zip(("prompt", *_names(pair)), (True, *pair.answers), (prompt, *answers), strict=True):
        if text and not ids:
            return InputError(
                pair.place,
                got=f"the tokenizer makes no token of {name!r}",
                expected="text with at least one",
                remedy=_DROP,
            )
    over = len(prompt) + max(map(len, answers)) > max_length
    if over and len(prompt) > max_prompt:
        if pair.droppable and rules.truncate_prompt == "keep_end" and not pair.reference:
            return TooLong(len(prompt))
        if rules.truncate_prompt == "error":
            return InputError(
                pair.place,
                got=f"a prompt of {len(prompt)} tokens, in a pair longer than data.max_length {max_length}",
                expected=f"at most data.max_prompt_length {max_prompt}",
                remedy=f"Raise the limits, or give --config.data.truncate_prompt=keep_end. {_DROP}",
            )
        prompt = _truncate_prompt(prompt, prefix, max_prompt, rules.truncate_prompt)
    room = max_length - len(prompt)
    encoded = Encoded.of(np.array(prompt, np.int32), *(_first_scored(ids, room) for ids in answers))
    prompt_cut = len(parts.prompt) - len(prompt)
    cuts = tuple(max(0, len(ids) - room) for ids in answers)
    for name, ids, all_ids in zip(_names(pair), encoded.answers, answers, strict=True):
        if all_ids and not len(ids):
            return InputError(
                pair.place,
                got=f"no scored token of {name!r} is within data.max_length {max_length}",
                expected="at least one",
                remedy=f"Raise --config.data.max_length. {_DROP}",
            )
    if pair.reference and (prompt_cut or any(cuts)):
        return InputError(
            pair.place,
            got=f"reference log-probs of a pair that data.max_length {max_length} cuts here by "
            f"{prompt_cut + sum(cuts)} tokens",
            expected="reference log-probs of exactly the tokens that are scored",
            remedy="Raise the limits, or leave the columns out with "
            f"--config.data.columns=ref_chosen_logps=,ref_rejected_logps=. {_DROP}",
        )
    if (same := _alike(encoded.answers)) is not None:
        which = "the answers" if len(answers) == 2 else "answers {} and {}".format(*same)
        after = f" after truncation to data.max_length {max_length}" if any(cuts) else ""
        return InputError(
            pair.place,
            got=f"{which} are the same tokens{after}",
            expected="answers that differ within the limit",
            remedy=f"Raise --config.data.max_length. {_DROP}" if any(cuts) else _DROP,
        )
    return Outcome(encoded, prompt_cut, cuts, boundary_split=split)


def _first_scored(ids: list[int], room: int) -> np.ndarray:
    """Returns the first `room` ids, without those at the end that are not scored."""
    array = np.array(ids[:room], np.int32)
    return array if not len(array) or array[-1] >= 0 else array[: np.flatnonzero(array >= 0).max(initial=-1) + 1]


def _names(pair: Pair) -> list[str]:
    """Names of the answers, for errors."""
    return [f"answer {n}" for n, _ in enumerate(pair.answers, start=1)] if pair.others else ["chosen", "rejected"]


def _alike(answers: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """Numbers, from 1, of the first two answers with the same tokens; None if all differ."""
    seen: dict[bytes, int] = {}
    for n, ids in enumerate(answers, start=1):
        if (first := seen.setdefault(ids.tobytes(), n)) != n:
            return first, n
    return None


def _truncate_prompt(prompt: list[int], prefix: int, size: int, mode: str) -> list[int]:
    """Truncates to `size` ids: the first ones (keep_start), or the `prefix` first ones and the last ones (keep_end)."""
    first = size if mode == "keep_start" else min(prefix, size)
    return prompt[:first] + prompt[len(prompt) - (size - first) :]
