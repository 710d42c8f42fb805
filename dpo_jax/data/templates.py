"""Renders conversations with a chat template, finds the text that is scored, and what the template left out."""

from __future__ import annotations

import datetime
import functools
import json
import os.path
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.chat import Conversation, Message, without_nulls
from dpo_jax.data.columns import DROP
from dpo_jax.data.written import omissions_of, places_of
from dpo_jax.types import InputError, Omission, Row, Spans

TURNS = ("assistant", "last", "all")

_PROBE = "dpojax"  # placeholder answer, to find the text that a template writes around answers
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Maps messages, and how their text ends, to that text.
Write: TypeAlias = Callable[..., str]


class Templating(NamedTuple):
    """How conversations are rendered: tokenizer with its chat template, and settings."""

    tokenizer: PreTrainedTokenizerBase
    turns: str = "assistant"  # one of TURNS: assistant: all turns of the model within an answer are scored; last: its
    # last one; all: everything that follows the prompt
    date: str = ""  # YYYY-MM-DD, the day that templates write; empty: today


class Templated(NamedTuple):
    """Text of a conversation as a chat template writes it."""

    prompt: str
    answers: list[str]
    left_out: str  # end of the generation header that finished answers lack, and that `prompt` therefore lacks
    scored: list[Spans]  # for each answer, the ranges of characters in its text that are scored
    omissions: list[Omission]


class TemplateLoss(InputError):
    """A row that cannot be used because a chat template left out part of it."""

    omissions: Sequence[Omission] = ()

    @classmethod
    def of(cls, error: InputError, omissions: Sequence[Omission]) -> TemplateLoss:
        """Returns the error of a row with what the template left out of it."""
        lost = cls(
            error.place,
            got=f"{error.got} once the chat template has left out {excerpt(omissions[0].text)}",
            expected=error.expected,
            remedy=f"Give a chat template that writes it, or change the row. {error.remedy}",
        )
        lost.omissions = omissions
        return lost


def excerpt(text: str, length: int = 60) -> str:
    """Returns the beginning of a text, quoted for a message."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def write(row: Row, conversation: Conversation, templating: Templating) -> Templated:
    """Renders a conversation with the tokenizer's chat template and the row's `tools` and `chat_template_kwargs`.

    Raises: InputError if there is no template, it cannot write the messages, or it writes the prompt differently before
      an answer.
    """
    prompt, answers = conversation
    tokenizer = templating.tokenizer
    options = _options(row, templating)
    write = functools.partial(_apply, tokenizer, row.place, options)
    # An assistant message that ends the prompt is continued by the answer, without a generation header between them.
    continued = prompt[-1]["role"] == "assistant"
    head = write(prompt, add_generation_prompt=not continued, continue_final_message=continued)
    conversations = [_joined(prompt, answer) for answer in answers]
    wholes = [write(each) for each in conversations]
    start = head
    if not all(whole.startswith(head) for whole in wholes) and not continued:
        # Some templates end the generation header with text that a finished answer lacks. The prompt then ends where
        # header and finished turn differ; a placeholder answer keeps the answers' own text out of the comparison.
        for answer in answers:
            turn = write([*prompt, {"role": "assistant", "content": _PROBE}, *answer[1:]])
            start = _common_tokens(tokenizer, start, turn[: turn.rfind(_PROBE)])
        if len(start) <= len(write(prompt)):
            start = head  # they differ before the end of the role
    if not all(whole.startswith(start) for whole in wholes):
        raise InputError(
            row.place,
            got="the chat template writes the prompt in another way when an answer follows",
            expected="text of prompt and answer that starts with the text of the prompt",
            remedy="Give chat_template_kwargs (such as enable_thinking) or a template with which it does.",
        )
    turns = _Turns(write, tokenizer, options, len(start), len(prompt) - continued)
    scored = [turns.scored(*each, templating.turns) for each in zip(conversations, wholes, strict=True)]
    omissions = omissions_of(prompt, answers, wholes, len(start), options)
    return Templated(start, [whole[len(start) :] for whole in wholes], head[len(start) :], scored, omissions)


def drop_oldest(prompt: list[Message], count: int) -> list[Message]:
    """Drops the `count` oldest exchanges of a prompt; an exchange is a user's message and all before the next one.

    Messages of the system or the developer that begin the prompt stay.
    """
    starts = _exchanges(prompt)
    return prompt[: starts[0]] + prompt[starts[count] :] if count else prompt


def droppable(prompt: list[Message]) -> int:
    """Counts the exchanges of a prompt that `drop_oldest` can drop: all but the last."""
    return max(0, len(_exchanges(prompt)) - 1)


def _exchanges(prompt: list[Message]) -> list[int]:
    """Indices of the messages at which exchanges begin: those of a user that follow no other one of a user."""
    roles = [None, *(message["role"] for message in prompt)]
    return [i for i, (before, role) in enumerate(zip(roles, roles[1:], strict=False)) if role == "user" != before]


class _Turns(NamedTuple):
    """Finds the scored text of answers to one prompt."""

    write: Write
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    start: int  # characters of the prompt
    first: int  # index of the message with which answers begin

    def scored(self, messages: list[Message], whole: str, turns: str) -> Spans:
        """Returns the ranges of characters of an answer that are scored, counted from the answer's start.

        Args:
          messages: those of prompt and answer.
          whole: their text.
        """
        spoken = [i for i in range(self.first, len(messages)) if messages[i]["role"] == "assistant"]
        spoken = spoken[-1:] if turns == "last" else spoken
        if turns == "all" or len(messages) == self.first + 1:
            spans = [(self.start, len(whole))]
        else:
            by_message = self._by_message(messages, whole)
            spans = [by_message[i - self.first] for i in spoken]
        marks = self._marked(messages, whole) if turns != "all" else None
        if marks is not None:
            spans = [(max(a, c), min(b, d)) for a, b in spans for c, d in marks]
        return tuple((a - self.start, b - self.start) for a, b in spans if a < b)

    def _by_message(self, messages: list[Message], whole: str) -> list[tuple[int, int]]:
        """Returns the range of each message of the answer in the text, headers excluded.

        A message ends where the text of the conversation up to it ends, and begins after the generation header. Where
        the template writes a turn differently once others follow, its place is that of its own words, with as much of
        the header before and of the end of turn after them as both texts share.
        """
        ranges, at, before = [], self.start, ""
        for i in range(self.first, len(messages)):
            upto = whole if i + 1 == len(messages) else self.write(messages[: i + 1])
            begin, ((words, words_end),) = at, places_of(whole, [messages[i]], at)
            if i > self.first and messages[i]["role"] == "assistant":
                header = self.write(messages[:i], add_generation_prompt=True)
                if whole.startswith(header):
                    begin = len(header)
                    ((words, words_end),) = places_of(whole, [messages[i]], begin)
                else:
                    shared = len(os.path.commonprefix([header, before]))
                    begin = self._after_header(header[shared:], whole, at, words)
            elif i > self.first:
                begin = words
            if whole.startswith(upto):
                end = len(upto)
            else:
                _, own_end = places_of(upto, [messages[i]], min(at, len(upto)))[0]
                end = words_end + len(_common_tokens(self.tokenizer, upto[own_end:], whole[words_end:]))
            ranges.append((begin, end))
            at, before = max(at, end), upto
        return ranges

    def _after_header(self, header: str, whole: str, at: int, words: int) -> int:
        """Returns where the longest beginning of the generation header ends that stands between `at` and `words`."""
        spans = _offsets(self.tokenizer, header)
        for _, end in reversed(spans):
            found = whole.rfind(header[:end], at, words)
            if found >= 0:
                return found + end
        return words

    def _marked(self, messages: list[Message], whole: str) -> list[tuple[int, int]] | None:
        """Returns the ranges that a template marks as generated; None if it marks nothing."""
        template = self.options.get("chat_template") or ""
        if not _MARKS.search(template):
            return None
        encoded = cast(Any, self.tokenizer).apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **self.options,
        )
        flags = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
        marked = [(a, b) for (a, b), mark in flags if mark]
        joined: list[tuple[int, int]] = []
        for a, b in marked:
            if joined and a <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
            else:
                joined.append((a, b))
        return joined or None


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Ranges of characters of the tokens of a text."""
    return cast(Any, tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def _common_tokens(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> str:
    """Longest beginning of two texts in common that ends at a token boundary, so that no special token is split."""
    encoded = tokenizer([text, other], add_special_tokens=False, return_offsets_mapping=True)
    shared = len(os.path.commonprefix(cast("list[list[int]]", encoded["input_ids"])))
    spans = cast("list[list[tuple[int, int]]]", encoded["offset_mapping"])[0]
    return text[: spans[shared - 1][1]] if shared else ""


def _joined(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """Messages of prompt and answer; the answer's first message continues an assistant message that ends the prompt."""
    last, first = prompt[-1], answer[0]
    if last["role"] != "assistant":
        return prompt + answer
    return [*prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *answer[1:]]


def _options(row: Row, templating: Templating) -> dict[str, Any]:
    """Template arguments: `tools` (a list, or JSON text of one), `chat_template_kwargs`, the template itself.

    Raises: InputError if there is no template.
    """
    tools, options = row.fields.get("tools"), row.fields.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            got = f"'tools' is broken JSON ({error})"
            raise InputError(row.place, got=got, expected="JSON text of a list", remedy=DROP) from error
    if not (tools is None or isinstance(tools, list)) or not isinstance(options, dict):
        raise InputError(
            row.place,
            got=f"'tools' is a {type(tools).__name__} and 'chat_template_kwargs' a {type(options).__name__}",
            expected="a list of tool schemas and a mapping",
            remedy=DROP,
        )
    # With an empty list some templates would write a heading for tools and then none.
    options = {"tools": without_nulls(tools) or None, **without_nulls(options)}
    tokenizer = templating.tokenizer
    if tokenizer.chat_template is None and "chat_template" not in options:
        raise InputError(
            row.place,
            got="chat messages, and a tokenizer without a chat template",
            expected="a template to write them with",
            remedy="Set tokenizer.path to a chat model's tokenizer, or give the preferences as text. Columns of text, "
            "instructions too, are read as they stand with data.format='plain'.",
        )
    template = tokenizer.get_chat_template(options.get("chat_template"), options["tools"])
    return {**options, "chat_template": dated(template, templating.date)}


def _with_arguments_as_text(message: Message) -> Message:
    """Writes the arguments of a message's calls as JSON text."""

    def written(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if "function" in call:
            return {**call, "function": written(call["function"])}
        return call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [written(call) for call in calls]} if isinstance(calls, list) else message


def writes_date(template: object) -> bool:
    """Whether a chat template, or one of several by name, writes the current date."""
    return "strftime_now" in str(template)


@functools.lru_cache(maxsize=64)
def dated(template: str, date: str) -> str:
    """Returns a chat template that writes a fixed day in place of the current one.

    Args:
      date: YYYY-MM-DD; empty: the template stays as it is.
    """
    if not date or not writes_date(template):
        return template
    day = datetime.date.fromisoformat(date)
    return _DATE.sub(lambda call: json.dumps(day.strftime(call[2]), ensure_ascii=False), template)


def _apply(
    tokenizer: PreTrainedTokenizerBase, place: str, options: dict[str, Any], messages: Sequence[Message], **form: bool
) -> str:
    """Text that the chat template writes for messages. Raises: InputError if it fails."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **form, **options)
    try:
        try:
            text = render(list(messages))
        except TypeError:
            # Some templates join the arguments of calls to text, so they take them as JSON text.
            text = render([_with_arguments_as_text(message) for message in messages])
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            place,
            got=f"the chat template cannot write this conversation ({error})",
            expected="messages that the template accepts",
            remedy=DROP,
        ) from error
    assert isinstance(text, str)
    return text
