"""Conversations: messages in the columns of a row, and the text that a chat template makes of them."""

from __future__ import annotations

import functools
import json
import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.columns import DROP, check_different, column
from dpo_jax.types import InputError, Row

_PROBE = "dpojax"  # stands for an answer where only what a template writes around it matters

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A prompt and answers to it as chat messages; each answer starts with an assistant message."""

    prompt: list[Message]
    answers: list[list[Message]]


class Templated(NamedTuple):
    """A conversation as a template writes it."""

    prompt: str
    answers: list[str]
    left_out: str  # the end of the generation header that is not in finished answers, and so not in `prompt`


def of_pair(row: Row) -> Conversation:
    """Prompt and answers of columns chosen and rejected, whether the prompt stands in its own column, in the answers
    or in both."""
    chosen, rejected = (messages(row, column(row, name), repr(name)) for name in ("chosen", "rejected"))
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
        return after_prompt(row, [chosen, rejected], ["'chosen'", "'rejected'"])
    return _checked(row, prompt, [chosen[start:], rejected[start:]], ["'chosen'", "'rejected'"])


def after_prompt(row: Row, answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    """The prompt of its own column, and the answers, which may all repeat it.

    Args:
      names: of the answers, for errors.
    """
    prompt = messages(row, column(row, "prompt"), "'prompt'")
    repeated = all(answer[: len(prompt)] == prompt for answer in answers)
    return _checked(row, prompt, [answer[len(prompt) if repeated else 0 :] for answer in answers], names)


def messages(row: Row, value: Any, name: str) -> list[Message]:
    """A list of chat messages, without what is null in them. Raises: InputError if the value is anything else."""
    value = _without_nulls(value)
    if not isinstance(value, list):
        raise InputError(
            row.place, got=f"{name} is a {type(value).__name__}", expected="a list of chat messages", remedy=DROP
        )
    found: list[Message] = []
    for message in value:
        kept = message if isinstance(message, dict) else {}
        content = kept.get("content", "" if kept.get("tool_calls") else None)
        if not isinstance(kept.get("role"), str) or not isinstance(content, str):
            raise InputError(
                row.place,
                got=f"message {len(found) + 1} of {name} lacks a role or has content that is not text",
                expected='{"role": text, "content": text}',
                remedy=DROP,
            )
        found.append({**kept, "content": content})
    return found


def _checked(row: Row, prompt: list[Message], answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    if not prompt:
        raise InputError(row.place, got="no prompt message", expected="at least one", remedy=DROP)
    check_different(row, answers)
    for name, answer in zip(names, answers, strict=True):
        if answer and answer[0]["role"] != "assistant":
            raise InputError(
                row.place,
                got=f"the answer in {name} starts with a {answer[0]['role']!r} message",
                expected="prompts that are the same and answers that start with an assistant message",
                remedy=DROP,
            )
        if not any(m["content"].strip() or m.get("tool_calls") for m in answer if m["role"] == "assistant"):
            raise InputError(row.place, got=f"{name} is empty", expected="an answer", remedy=DROP)
    return Conversation(prompt, answers)


def write(row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Templated:
    """Prompt and answers as the tokenizer's chat template writes them, by the row's `tools` and `chat_template_kwargs`.

    Raises: InputError if there is no template, or it cannot write them, or writes the prompt in another way.
    """
    prompt, answers = conversation
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
    return Templated(start, [whole[len(start) :] for whole in wholes], head[len(start) :])


def _without_nulls(value: Any) -> Any:
    """The same without the null keys that Arrow fills in, at any depth, where other rows have a value."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


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
            raise InputError(row.place, got=got, expected="JSON text of a list", remedy=DROP) from error
    if not (tools is None or isinstance(tools, list)) or not isinstance(options, dict):
        raise InputError(
            row.place,
            got=f"'tools' is a {type(tools).__name__} and 'chat_template_kwargs' a {type(options).__name__}",
            expected="a list of tool schemas and a mapping",
            remedy=DROP,
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
            remedy=DROP,
        ) from error
    assert isinstance(text, str)
    return text
