"""Compares the messages of a conversation with the text that a chat template wrote of them."""

from __future__ import annotations

import functools
import json
import os.path
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.chat import FACTORS, Message
from dpo_jax.data.columns import is_empty
from dpo_jax.types import Omission

PROMPT = -1  # in place of an answer's index

_THINK = re.compile(r"(</?think>)")
_REASONING = frozenset(("reasoning_content", "reasoning", "thinking"))  # keys under which messages have it apart
_READ = _REASONING | {"role", "content", "tool_calls", "tool_call_id", *FACTORS}  # keys that are read, or compared here
_THOUGHT = "reasoning"  # the part of a message that templates leave out most often
_CALL, _RESULT = "a tool call", "a tool message"  # parts that templates may write as JSON


class Piece(NamedTuple):
    """A text that a template should write for a message."""

    part: str  # the kind of text, for people
    text: str
    other: str = ""  # another spelling of it


def omissions_of(
    prompt: Sequence[Message],
    answers: Sequence[Sequence[Message]],
    wholes: Sequence[str],
    start: int,
    options: Mapping[str, Any],
) -> list[Omission]:
    """Returns what a template left out of the text of a prompt and of its answers.

    The texts of the messages must stand in the text in their order; the system's may stand anywhere, because some
    templates write it into the last user's turn.

    Args:
      wholes: text of the prompt with each of the answers.
      start: characters of the prompt in it.
      options: of the template: its `tools` must be written, and the template must read the names of the others.
    """
    missing = [Omission(piece.part, PROMPT, piece.text) for piece in _settings(options, wholes[0][:start])]
    lacking, end = _missing(wholes[0], [*prompt, *answers[0]], 0, stop=len(prompt))
    missing += [Omission(piece.part, PROMPT, piece.text) for piece in lacking]
    for number, (answer, whole) in enumerate(zip(answers, wholes, strict=True)):
        # From the end of the prompt's own words: generation headers may hold the tag that opens reasoning.
        lacking, _ = _missing(whole, answer, min(start, end))
        missing += [Omission(piece.part, number, piece.text) for piece in lacking]
    return missing


def unread_keys(messages: Iterable[Message], template: str) -> tuple[str, ...]:
    """Returns the keys of messages with a value that neither their reader nor the template reads."""
    others = {key for message in messages for key in message.keys() - _READ if not is_empty(message[key])}
    return tuple(sorted(key for key in others if not _mentions(template, key)))


@functools.lru_cache(maxsize=256)
def _mentions(template: str, key: str) -> bool:
    """Whether a template has a word."""
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def unscored(number: int, messages: Sequence[Message], scored: str, known: Sequence[Omission]) -> list[Omission]:
    """Returns what the scored text of an answer lacks of the messages that should be scored, besides what is known.

    Args:
      number: index of the answer.
      messages: those of the assistant.
    """
    lacking, _ = _missing(scored, messages, 0)
    lost = {each.part for each in known if each.answer == number}
    return [
        Omission(f"{piece.part} that is not scored", number, piece.text)
        for piece in lacking
        if piece.part not in lost and piece.text != "<think>"  # which a generation header may hold
    ]


def places_of(text: str, messages: Sequence[Message], at: int) -> list[tuple[int, int]]:
    """Returns the range of each message's own words in a text, in order from `at`; an empty one where none is there."""
    places = []
    for message in messages:
        found = [place for _, place in _found(text, message, at) if place is not None]
        begin = min((a for a, _ in found), default=at)
        at = max((b for _, b in found), default=at)
        places.append((begin, at))
    return places


def lost_characters(text: str, decoded: str) -> str:
    """Returns the beginning of what decoded tokens lack or have otherwise of a text; empty where they agree.

    Whitespace does not count, because many tokenizers write some of it otherwise, nor do compatible characters of
    Unicode (NFKC), which some replace.
    """
    if text == decoded:
        return ""
    wanted, there = ("".join(unicodedata.normalize("NFKC", each).split()) for each in (text, decoded))
    if wanted == there:
        return ""
    shared = len(os.path.commonprefix([wanted, there]))
    return wanted[shared : shared + 20] or there[shared : shared + 20]


def untrimmed(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extends the ranges of a text's tokens over whitespace, which some tokenizers leave out of them.

    Whitespace belongs to the token that follows it.
    """
    whole, end = [], 0
    for a, b in offsets:
        whole.append((min(a, end), b))
        end = max(end, b)
    return whole


def _missing(text: str, messages: Sequence[Message], at: int, *, stop: int | None = None) -> tuple[list[Piece], int]:
    """Returns the pieces of messages that a text lacks, searched in their order from `at`, and the end of the last.

    Args:
      stop: number of messages that are searched; None: all. Texts of the others only count as theirs.
    """
    missing = []
    for message in messages[:stop]:
        anywhere = message["role"] in ("system", "developer")
        end = at
        for piece, place in _found(text, message, 0 if anywhere else at):
            if place is None or anywhere and not _own(piece, text, message, messages):
                missing.append(piece)
            else:
                end = max(end, place[1])
        at = at if anywhere else end
    return missing, at


def _own(piece: Piece, text: str, message: Message, messages: Sequence[Message]) -> bool:
    """Whether a text holds a piece once more than the other messages account for."""
    others = sum(each["content"].count(piece.text) for each in messages if each is not message)
    return not others or text.count(piece.text) > others


def _found(text: str, message: Message, at: int) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Yields the pieces of a message with their ranges in a text, None where a piece is missing.

    Words are searched one after another; calls after them, name and arguments in any order.
    """
    words = list(_words(message))
    places = list(_in_order(text, words, at))
    if any(place is None and piece.part != _THOUGHT for piece, place in places):
        # Reasoning that is left out may be found by chance in the content, which then seems to be missing after it.
        without = list(_in_order(text, [piece for piece in words if piece.part != _THOUGHT], at))
        if all(place is not None for _, place in without):
            places = [*without, *((piece, None) for piece in words if piece.part == _THOUGHT)]
    yield from places
    at = max((place[1] for _, place in places if place is not None), default=at)
    calls = [(piece, _find(text, piece, at)) for piece in _calls(message)]
    written = all(place is not None for _, place in calls)
    for piece, place in calls:
        # Names and numbers of a call that is left out are found in other turns, where they must not end this message.
        yield piece, place if written or place is None else (at, at)


def _in_order(text: str, words: Sequence[Piece], at: int) -> Iterator[tuple[Piece, tuple[int, int] | None]]:
    """Yields pieces with their ranges in a text, each searched after the one before it."""
    tag, lost = "", False
    for piece in words:
        if piece.text in ("<think>", "</think>"):
            tag = piece.text
            continue
        place = _find(text, piece, at)
        yield piece, place
        # A tag is looked for only between the texts beside it, because other turns have such tags as well.
        if tag and place is not None and not lost:
            found = text.find(tag, at, place[0])
            yield Piece(_THOUGHT, tag), (found, found + len(tag)) if found >= 0 else None
        tag, lost = "", place is None
        at = at if place is None else place[1]


def _find(text: str, piece: Piece, at: int) -> tuple[int, int] | None:
    """Returns the first range of a piece in a text, as it is or escaped as in JSON."""
    begin = text.find(piece.text, at)
    if begin >= 0 and piece.part not in (_CALL, _RESULT):
        return begin, begin + len(piece.text)
    spellings = {piece.text, piece.other, *(json.dumps(piece.text, ensure_ascii=each)[1:-1] for each in (False, True))}
    found = [(text.find(spelling, at), len(spelling)) for spelling in spellings - {""}]
    # The nearest: a later turn may repeat in plain words what a call has escaped.
    begin, length = min(((begin, -length) for begin, length in found if begin >= 0), default=(-1, 0))
    return (begin, begin - length) if begin >= 0 else None


def _words(message: Message) -> Iterator[Piece]:
    """Yields the texts of a message: reasoning kept apart, then its content, divided at the tags of reasoning."""
    role = message["role"]
    if not _REASONING.isdisjoint(message):
        apart = [piece.text for key in sorted(_REASONING) for piece in _leaves(_THOUGHT, message.get(key))]
        yield from (Piece(_THOUGHT, text) for text in dict.fromkeys(apart))
    content = message["content"]
    if role != "assistant" or "think>" not in content:
        if content.strip():
            yield Piece("text" if role == "assistant" else f"a {role} message", content.strip())
        return
    inside = "<think>" not in content  # some answers begin inside the reasoning, after a generation header's tag
    parts = [part.strip() for part in _THINK.split(content)]
    for i, part in enumerate(parts):
        if part in ("<think>", "</think>"):
            inside = part == "<think>"
            reasoning = parts[i + 1] if inside else parts[i - 1]
            if reasoning:
                yield Piece(_THOUGHT, part)
        elif part:
            yield Piece(_THOUGHT if inside else "text", part)


def _calls(message: Message) -> Iterator[Piece]:
    """Yields names and arguments of the calls in a message."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict):
            yield from _leaves(_CALL, [function.get(key) for key in ("name", "arguments", "parameters")])


def _settings(options: Mapping[str, Any], text: str) -> Iterator[Piece]:
    """Yields what a text lacks of the schemas of tools, and the options that the template does not read."""
    for tool in options.get("tools") or []:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        schema = function.get("parameters") if isinstance(function, dict) else None
        names = list(schema.get("properties") or {}) if isinstance(schema, dict) else []
        for piece in _leaves("a tool's schema", [function.get("name"), function.get("description"), names]):
            if _find(text, piece, 0) is None:
                yield piece
    for name in options.keys() - {"tools", "chat_template"}:
        if not _mentions(options["chat_template"], name):
            yield Piece("a value of chat_template_kwargs", name)


def _leaves(part: str, value: Any) -> Iterator[Piece]:
    """Yields the keys, texts and numbers of a JSON value."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(part, [name, each])
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(part, each)
    elif isinstance(value, str):
        if value.strip():
            yield Piece(part, value.strip())
    elif value is not None:
        yield Piece(part, json.dumps(value), str(value))
