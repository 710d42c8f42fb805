"""Renders conversations with a chat template, finds the text that is scored, and what the template left out."""

from __future__ import annotations

import datetime
import difflib
import functools
import itertools
import json
import os.path
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_jax.data.chat import ROLES, Conversation, Message, without_nulls
from dpo_jax.data.columns import DROP, described
from dpo_jax.data.written import omissions_of, places_of, unread_keys, unscored, untrimmed
from dpo_jax.types import InputError, Omission, Row, Spans, shown

TURNS = ("assistant", "last", "all")

_PROBE = "dpojax"  # placeholder answer, to find the text that a template writes around answers
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
# Arguments of `apply_chat_template` that are set here, not by rows.
_TAKEN = frozenset(
    "conversation tokenize add_generation_prompt continue_final_message return_dict return_tensors padding truncation "
    "max_length return_assistant_tokens_mask tokenizer_kwargs sanitize_control_tokens messages".split()
)

# Maps messages, and how their text ends, to that text.
Write: TypeAlias = Callable[..., str]
T = TypeVar("T")


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
    unread: tuple[str, ...]  # keys of messages that nothing reads


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
    _check_roles(row, itertools.chain(prompt, *answers), options["chat_template"])
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
            got="the chat template writes the prompt differently when an answer follows it",
            expected="the same text for the prompt, with and without an answer",
            remedy="Give chat_template_kwargs (such as enable_thinking) or a template with which it does.",
        )
    turns = _Turns(write, tokenizer, options, len(start), len(prompt) - continued)
    scored = [turns.scored(*each, templating.turns) for each in zip(conversations, wholes, strict=True)]
    texts = [whole[len(start) :] for whole in wholes]
    omissions = omissions_of(prompt, answers, wholes, len(start), options)
    for number, (answer, text, spans) in enumerate(zip(answers, texts, scored, strict=True)):
        if templating.turns != "all" and spans != ((0, len(text)),):
            spoken = [message for message in answer if message["role"] == "assistant"]
            spoken = spoken[-1:] if templating.turns == "last" else spoken
            omissions += unscored(number, spoken, "".join(text[a:b] for a, b in spans), omissions)
    unread = unread_keys(itertools.chain(prompt, *answers), options["chat_template"])
    return Templated(start, texts, head[len(start) :], scored, omissions, unread)


def drop_oldest(prompt: list[Message], count: int) -> list[Message]:
    """Drops the `count` oldest exchanges of a prompt; an exchange is a user's message and all before the next one.

    Messages of the system or the developer that begin the prompt stay.
    """
    if not count:
        return prompt
    starts = _exchanges(prompt)
    return prompt[: starts[0]] + prompt[starts[count] :]


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
            message = [messages[i]]
            upto = whole if i + 1 == len(messages) else self.write(messages[: i + 1])
            begin = alone = at  # of the message in the whole text, and where it ends the text
            if i > self.first and messages[i]["role"] == "assistant":
                header = self.write(messages[:i], add_generation_prompt=True)
                shared = len(os.path.commonprefix([header, before]))
                words = places_of(whole, message, at)[0][0]
                begin = (
                    len(header) if whole.startswith(header) else self._after_header(header[shared:], whole, at, words)
                )
                alone = len(header) if upto.startswith(header) else at
            elif i > self.first:
                begin = places_of(whole, message, at)[0][0]
            if whole.startswith(upto):
                end = len(upto)
            else:
                words_end = places_of(whole, message, begin)[0][1]
                own_end = places_of(upto, message, min(alone, len(upto)))[0][1]
                end = words_end + len(_common_tokens(self.tokenizer, upto[own_end:], whole[words_end:]))
            ranges.append((begin, end))
            at, before = max(at, end), upto
        return ranges

    def _after_header(self, header: str, whole: str, at: int, words: int) -> int:
        """Returns where the generation header ends, or as much of it as stands at its next place after `at`.

        Args:
          words: where the turn's own words are, if the header is missing.
        """
        ends = [end for _, end in _offsets(self.tokenizer, header)]
        begin = whole.find(header[: ends[0]], at) if ends else -1
        return words if begin < 0 else begin + max(end for end in ends if whole.startswith(header[:end], begin))

    def _marked(self, messages: list[Message], whole: str) -> list[tuple[int, int]] | None:
        """Returns the ranges that a template marks as generated; None if it marks nothing."""
        if not _MARKS.search(self.options["chat_template"]):
            return None
        options = {**self.tokenizer.special_tokens_map, **self.options}
        render = functools.partial(render_jinja_template, return_assistant_tokens_mask=True, **options)
        (text,), (marks,) = _with_either_arguments(lambda each: render([each]), messages)
        assert text == whole
        return cast("list[tuple[int, int]]", marks) or None


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Ranges of characters of the tokens of a text."""
    return untrimmed(
        cast(Any, tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )


def _common_tokens(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> str:
    """Longest beginning of two texts in common that ends at a token boundary, so that no special token is split."""
    encoded = tokenizer([text, other], add_special_tokens=False, return_offsets_mapping=True)
    shared = len(os.path.commonprefix(cast("list[list[int]]", encoded["input_ids"])))
    spans = untrimmed(cast("list[list[tuple[int, int]]]", encoded["offset_mapping"])[0])
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
    tools, options = (_decoded(row, name) for name in ("tools", "chat_template_kwargs"))
    tools = [_decoded(row, "tools", tool) for tool in tools] if isinstance(tools, list) else tools
    if not (tools is None or isinstance(tools, list)):
        got = f"'tools' is {described(tools)}"
        raise InputError(row.place, got=got, expected="a list of objects, one for each tool", remedy=DROP)
    if not (options is None or isinstance(options, dict)):
        got = f"'chat_template_kwargs' is {described(options)}"
        raise InputError(row.place, got=got, expected="an object", remedy=DROP)
    options = without_nulls(options or {})
    if taken := sorted(_TAKEN & options.keys() | ({"tools"} & options.keys() if tools else set())):
        raise InputError(
            row.place,
            got=f"'chat_template_kwargs' with {', '.join(map(repr, taken))}",
            expected="arguments that are not set by the data's layout or its other columns",
            remedy=DROP,
        )
    # With an empty list some templates would write a heading for tools and then none.
    options = {"tools": without_nulls(tools) or None, **options}
    tokenizer = templating.tokenizer
    if tokenizer.chat_template is None and "chat_template" not in options:
        raise InputError(
            row.place,
            got="chat messages, and a tokenizer without a chat template",
            expected="a template to write them with",
            remedy="Give --config.tokenizer.path=FOLDER of a chat model's tokenizer, or write the preferences as text; "
            "columns of text are read as they are with --config.data.format=plain.",
        )
    try:
        template = tokenizer.get_chat_template(options.get("chat_template"), options["tools"])
    except ValueError as error:
        raise InputError(
            row.place,
            got=f"no chat template of the tokenizer's that is for this row ({' '.join(str(error).split())})",
            expected="a template named default",
            remedy='Name one of them in the column chat_template_kwargs, as {"chat_template": NAME}.',
        ) from error
    return {**options, "chat_template": dated(template, templating.date)}


def _check_roles(row: Row, messages: Iterable[Message], template: str) -> None:
    """Raises InputError for a role that is none of ROLES and that the template does not name."""
    for role in {message["role"]: None for message in messages}:
        if role not in ROLES and not _quotes(template, role):
            near = difflib.get_close_matches(role, ROLES, n=1)
            raise InputError(
                row.place,
                got=f"a message of the role {shown(role)}, which the chat template does not name",
                expected=f"one of {', '.join(ROLES)}, or a role that the template has in quotes",
                remedy=f"{f'Did you mean {near[0]}? ' if near else ''}{DROP}",
            )


@functools.lru_cache(maxsize=256)
def _quotes(template: str, text: str) -> bool:
    """Whether a template has a text in quotes."""
    return f"'{text}'" in template or f'"{text}"' in template


def _decoded(row: Row, name: str, value: Any = None) -> Any:
    """Value of a column, or `value` from it, decoded if it is the JSON text of a list or an object."""
    value = row.fields.get(name) if value is None else value
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value else None
    except json.JSONDecodeError as error:
        got = f"{name!r} is text that is no JSON ({error})"
        raise InputError(row.place, got=got, expected="a list or an object, or its JSON text", remedy=DROP) from error


def _with_either_arguments(render: Callable[[list[Message]], T], messages: Sequence[Message]) -> T:
    """Renders messages with the arguments of calls as objects, or as JSON text if the template joins them to text."""
    try:
        return render(list(messages))
    except TypeError:
        return render([_with_arguments_as_text(message) for message in messages])


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
    Raises: InputError for a template that computes the format of the day.
    """
    if not date or not writes_date(template):
        return template
    day = datetime.date.fromisoformat(date)
    fixed = _DATE.sub(lambda call: json.dumps(day.strftime(call[2]), ensure_ascii=False), template)
    if left := re.search(r"strftime_now\s*\([^)]*\)?", fixed):
        raise InputError(
            "chat template",
            got=f"asks for the day by {left[0]}",
            expected='a format in quotes, such as strftime_now("%Y-%m-%d")',
            remedy="Write the format into the template.",
        )
    return fixed


def _apply(
    tokenizer: PreTrainedTokenizerBase, place: str, options: dict[str, Any], messages: Sequence[Message], **form: bool
) -> str:
    """Text that the chat template writes for messages. Raises: InputError if it fails."""
    try:
        render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **form, **options)
        text = _with_either_arguments(cast("Callable[[list[Message]], str]", render), messages)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            place,
            got=f"the chat template cannot write this conversation ({error})",
            expected="messages that the template accepts",
            remedy=DROP,
        ) from error
    assert isinstance(text, str)
    return text
