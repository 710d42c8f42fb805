"""The forms in which preference rows come, and the one form they are turned into: text of a prompt and two answers."""

from __future__ import annotations

import functools
import json
import math
import os.path
from typing import Any, NamedTuple, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo_jax.types import InputError, Pair, Row

FORMATS = ("plain", "chat", "hh")
HEADER = "\n\nAssistant:"  # ends the prompt of an HH transcript

_DROP = 'Correct or drop the row, or set data.on_bad_row="skip".'
_PROBE = "dpojax"  # stands for an answer where only what a template writes around it matters

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A preference as chat messages; each answer starts with an assistant message."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def detect(row: Row) -> str:
    """The format of a row: `chat` for messages, `plain` for text with a prompt column, `hh` for HH transcripts.

    Raises: InputError if it is none of them.
    """
    chosen, rejected = (_column(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return "chat"
    texts = _text(row, "chosen"), _text(row, "rejected")
    if row.fields.get("prompt") is not None:
        return "plain"
    if all(HEADER in text for text in texts):
        return "hh"
    raise InputError(
        row.place,
        got="text answers without a 'prompt' column",
        expected=f"a prompt column, or transcripts with {HEADER!r} before each answer",
        remedy="Add the prompt as a column of its own: where an answer starts cannot be told from plain text.",
    )


def render(row: Row, *, format: str, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """The preference in a row as text.

    plain: columns prompt, chosen, rejected, used as they stand; no separator is put between them.
    hh: columns chosen, rejected, each the whole transcript. The prompt ends with the last `"\\n\\nAssistant:"` before
      the first difference, wherever inside the answers that difference is.
    chat: the same columns as message lists, with or without a prompt, written out by the tokenizer's chat template.
      The generation header belongs to the prompt; an answer continues an assistant message that ends the prompt.
      Optional columns `tools`, `chat_template_kwargs`; null keys in any of these count as absent.

    Columns `ref_chosen_logps` and `ref_rejected_logps` are passed on; other columns are not looked at.

    Args:
      format: one of FORMATS; every row must be of it.
      tokenizer: for its chat template.
    Raises: InputError for a row that is not of the format, an empty answer, two equal answers, half a reference or a
      conversation that the template cannot write.
    """
    if format == "chat":
        prompt, chosen, rejected, _ = _templated(row, tokenizer)
    elif format == "hh":
        prompt, chosen, rejected = _transcript(row)
    elif format == "plain":
        prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    else:
        raise InputError(
            "data.format", got=repr(format), expected=f"auto or one of {', '.join(FORMATS)}", remedy="Correct it."
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise InputError(row.place, got=f"{name!r} is empty", expected="an answer", remedy=_DROP)
    if chosen == rejected:
        raise InputError(row.place, got="the answers are equal", expected="two different answers", remedy=_DROP)
    for text in (prompt, chosen, rejected):
        _check_characters(row, text)
    return Pair(row.place, prompt, chosen, rejected, templated=format == "chat", reference=_reference(row))


def header_left_out(row: Row, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of the generation header that the template does not write before a finished answer.

    Such as `<think>\\n` of DeepSeek-R1's template: generation starts after it, training text lacks it. Empty for most.

    Raises: as `render` for a chat row.
    """
    return _templated(row, tokenizer)[3]


def _column(row: Row, name: str) -> Any:
    value = row.fields.get(name)
    if value is None:
        raise InputError(
            row.place,
            got=f"no {name!r} among the columns {', '.join(map(repr, row.fields))}",
            expected="chosen and rejected, with a prompt column unless the answers carry the prompt",
            remedy="Rename or add the column.",
        )
    return value


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise InputError(row.place, got=f"{name!r} is a {type(value).__name__}", expected="text", remedy=_DROP)
    return value


def _check_characters(row: Row, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # from JSON escapes such as \ud800; tokenizers fail on it without a place
        raise InputError(
            row.place,
            got=f"half a character (lone surrogate {text[error.start]!r})",
            expected="text that UTF-8 can encode",
            remedy=_DROP,
        ) from error


def _reference(row: Row) -> tuple[float, float] | None:
    """Reference log-probabilities given with the row, in nats."""
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    given = [None if (value := row.fields.get(name)) == "" else value for name in columns]  # CSV has no other null
    if given == [None, None]:
        return None
    values: list[float] = []
    for name, value in zip(columns, given, strict=True):
        number = _finite(value)
        if number is None:
            raise InputError(
                row.place,
                got=f"no {name!r} beside the other one" if value is None else f"{name!r} is {value!r}",
                expected="both reference log-probabilities, finite numbers, or neither",
                remedy="Give both columns or take both away.",
            )
        values.append(number)
    return values[0], values[1]


def _finite(value: Any) -> float | None:
    """A number, or the text of one (all that CSV has), as a float; None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _transcript(row: Row) -> tuple[str, str, str]:
    """Splits two HH transcripts into the prompt they share and their answers."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if row.fields.get("prompt") is not None:
        raise InputError(
            row.place,
            got="a 'prompt' column",
            expected="HH transcripts, which carry their prompt",
            remedy='Set data.format="plain", or take the column away.',
        )
    # What both share may run far into the answers, and even into later turns of a longer one.
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(HEADER) + len(HEADER)
    if end < len(HEADER):
        raise InputError(
            row.place, got=f"no {HEADER!r} common to both texts", expected="two HH transcripts", remedy=_DROP
        )
    return shared[:end], chosen[end:], rejected[end:]


def _without_nulls(value: Any) -> Any:
    """The same without the null keys that Arrow fills in, at any depth, where other rows have a value."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _messages(row: Row, name: str) -> list[Message]:
    """A column of chat messages."""
    value = _without_nulls(_column(row, name))
    if not isinstance(value, list):
        raise InputError(
            row.place, got=f"{name!r} is a {type(value).__name__}", expected="a list of chat messages", remedy=_DROP
        )
    messages: list[Message] = []
    for message in value:
        kept = message if isinstance(message, dict) else {}
        content = kept.get("content", "" if kept.get("tool_calls") else None)
        if not isinstance(kept.get("role"), str) or not isinstance(content, str):
            raise InputError(
                row.place,
                got=f"message {len(messages) + 1} of {name!r} lacks a role or has content that is not text",
                expected='{"role": text, "content": text}',
                remedy=_DROP,
            )
        messages.append({**kept, "content": content})
    return messages


def _conversation(row: Row) -> Conversation:
    """Prompt and answers of a chat row, whether the prompt stands in its own column, in the answers or in both."""
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    given = row.fields.get("prompt")
    if given is None:
        start, prompt = shared, chosen[:shared]
    elif isinstance(given, str):
        # Public sets often repeat the question as text beside whole conversations.
        start, prompt = shared, chosen[:shared] or [{"role": "user", "content": given}]
        if all(given.strip() != message["content"].strip() for message in prompt):
            raise InputError(
                row.place,
                got="a text prompt that is not one of the messages both answers start with",
                expected="answers that carry this prompt, or assistant messages only",
                remedy="Give the prompt as messages.",
            )
    else:
        prompt = _messages(row, "prompt")
        repeated = chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
        start = len(prompt) if repeated else 0
    if not prompt:
        raise InputError(row.place, got="no prompt message", expected="at least one", remedy=_DROP)
    _check_answers(row, chosen[start:], rejected[start:])
    return Conversation(prompt, chosen[start:], rejected[start:])


def _check_answers(row: Row, chosen: list[Message], rejected: list[Message]) -> None:
    if chosen == rejected:
        raise InputError(row.place, got="the answers are equal", expected="two different answers", remedy=_DROP)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer and answer[0]["role"] != "assistant":
            raise InputError(
                row.place,
                got=f"the answer in {name!r} starts with a {answer[0]['role']!r} message",
                expected="prompts that are the same and answers that start with an assistant message",
                remedy=_DROP,
            )
        if not any(m["content"].strip() or m.get("tool_calls") for m in answer if m["role"] == "assistant"):
            raise InputError(row.place, got=f"{name!r} is empty", expected="an answer", remedy=_DROP)


def _templated(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """Prompt, chosen, rejected as the template writes them, and the end of its generation header left out of them."""
    conversation = _conversation(row)
    prompt, *answers = conversation
    write = functools.partial(_apply, tokenizer, row.place, _options(row))
    # A prompt that ends in an assistant message is the beginning of the answer: no header comes between.
    continued = prompt[-1]["role"] == "assistant"
    head = write(prompt, add_generation_prompt=not continued, continue_final_message=continued)
    wholes = [write(_joined(prompt, answer)) for answer in answers]
    start = head
    if not all(whole.startswith(head) for whole in wholes) and not continued:
        # Some templates end the generation header with text that a finished answer lacks. The prompt then ends where
        # header and finished turn part; a stand-in answer keeps the answers' own letters out of the comparison.
        turn = write([*prompt, {"role": "assistant", "content": _PROBE}])
        start = _common_tokens(tokenizer, head, turn[: turn.rfind(_PROBE)])
        if len(start) <= len(write(prompt)):
            start = head  # not even the role is in common
    if not all(whole.startswith(start) for whole in wholes):
        raise InputError(
            row.place,
            got="the chat template writes the prompt in another way when an answer follows",
            expected="the prompt to be the beginning of prompt and answer",
            remedy="Give chat_template_kwargs (such as enable_thinking) or a template under which it is.",
        )
    chosen, rejected = (whole[len(start) :] for whole in wholes)
    return start, chosen, rejected, head[len(start) :]


def _common_tokens(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> str:
    """The beginning that two texts share in whole tokens, so that no special token is cut in two."""
    encoded = tokenizer([text, other], add_special_tokens=False, return_offsets_mapping=True)
    ids, others = cast("list[list[int]]", encoded["input_ids"])
    shared = len(os.path.commonprefix([ids, others]))
    spans = cast("list[list[tuple[int, int]]]", encoded["offset_mapping"])[0]
    return text[: spans[shared - 1][1]] if shared else ""


def _joined(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The conversation with an answer; an assistant message that ends the prompt is continued by the answer's first."""
    last, first = prompt[-1], answer[0]
    if last["role"] != "assistant":
        return prompt + answer
    return [*prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *answer[1:]]


def _options(row: Row) -> dict[str, Any]:
    """Arguments of the template from the columns `tools` (a list, or JSON text of one) and `chat_template_kwargs`."""
    tools, options = row.fields.get("tools"), row.fields.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            got = f"'tools' is broken JSON ({error})"
            raise InputError(row.place, got=got, expected="JSON text of a list", remedy=_DROP) from error
    if not (tools is None or isinstance(tools, list)) or not isinstance(options, dict):
        raise InputError(
            row.place,
            got=f"'tools' is a {type(tools).__name__} and 'chat_template_kwargs' a {type(options).__name__}",
            expected="a list of tool schemas and a mapping",
            remedy=_DROP,
        )
    # An empty list makes some templates write a heading without tools.
    return {"tools": _without_nulls(tools) or None, **_without_nulls(options)}


def _apply(
    tokenizer: PreTrainedTokenizerBase, place: str, options: dict[str, Any], messages: list[Message], **form: bool
) -> str:
    if tokenizer.chat_template is None and "chat_template" not in options:
        raise InputError(
            place,
            got="chat messages, and a tokenizer without a chat template",
            expected="a template to write them with",
            remedy="Set tokenizer.path to a chat model's tokenizer, or give the preferences as text.",
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **form, **options)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            place,
            got=f"the chat template cannot write this conversation ({error})",
            expected="messages that the template accepts",
            remedy=_DROP,
        ) from error
    assert isinstance(text, str)
    return text
