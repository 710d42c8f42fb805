"""Reads conversations from the columns of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax.data.columns import DROP, check_different, column
from dpo_jax.types import InputError, Row

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A prompt and answers to it as chat messages; each answer starts with an assistant message."""

    prompt: list[Message]
    answers: list[list[Message]]


def of_pair(row: Row) -> Conversation:
    """Prompt and answers from columns chosen and rejected; the prompt is in its own column, in the answers, or in both.

    Raises: InputError if the messages are damaged or do not make a prompt and two answers.
    """
    chosen, rejected = (messages(row, column(row, name), repr(name)) for name in ("chosen", "rejected"))
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    own = row.fields.get("prompt")
    if own is None:
        start, prompt = shared, chosen[:shared]
    elif isinstance(own, str):
        # Public data sets often repeat the question as text beside entire conversations.
        start, prompt = shared, chosen[:shared] or [{"role": "user", "content": own}]
        if all(own.strip() != message["content"].strip() for message in prompt):
            raise InputError(
                row.place,
                got="a text prompt that is not one of the messages both answers start with",
                expected="answers that start with this prompt, or with an assistant message",
                remedy="Give the prompt as messages.",
            )
    else:
        return after_prompt(row, [chosen, rejected], ["'chosen'", "'rejected'"])
    return _checked(row, prompt, [chosen[start:], rejected[start:]], ["'chosen'", "'rejected'"])


def after_prompt(row: Row, answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    """Conversation with the prompt from its own column; answers may all repeat the prompt.

    Args:
      names: names of the answers, for errors.
    Raises: InputError if the messages are damaged, or an answer does not start with an assistant message.
    """
    prompt = messages(row, column(row, "prompt"), "'prompt'")
    repeated = all(answer[: len(prompt)] == prompt for answer in answers)
    return _checked(row, prompt, [answer[len(prompt) if repeated else 0 :] for answer in answers], names)


def messages(row: Row, value: Any, name: str) -> list[Message]:
    """Chat messages without their null fields. Raises: InputError if the value is no list of messages."""
    value = without_nulls(value)
    if not isinstance(value, list):
        raise InputError(
            row.place, got=f"{name} is a {type(value).__name__}", expected="a list of chat messages", remedy=DROP
        )
    checked: list[Message] = []
    for message in value:
        fields = message if isinstance(message, dict) else {}
        content = fields.get("content", "" if fields.get("tool_calls") else None)
        if not isinstance(fields.get("role"), str) or not isinstance(content, str):
            raise InputError(
                row.place,
                got=f"message {len(checked) + 1} of {name} lacks a role or has content that is not text",
                expected='{"role": text, "content": text}',
                remedy=DROP,
            )
        checked.append({**fields, "content": content})
    return checked


def _checked(row: Row, prompt: list[Message], answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    """Checks that there is a prompt and that the answers are different, not empty, and start with the assistant."""
    if not prompt:
        raise InputError(row.place, got="no prompt message", expected="at least one", remedy=DROP)
    check_different(row, answers)
    for name, answer in zip(names, answers, strict=True):
        if answer and answer[0]["role"] != "assistant":
            raise InputError(
                row.place,
                got=f"the answer in {name} starts with a {answer[0]['role']!r} message",
                expected="equal prompts, and answers that start with an assistant message",
                remedy=DROP,
            )
        if not any(m["content"].strip() or m.get("tool_calls") for m in answer if m["role"] == "assistant"):
            raise InputError(row.place, got=f"{name} is empty", expected="an answer", remedy=DROP)
    return Conversation(prompt, answers)


def without_nulls(value: Any) -> Any:
    """Removes null keys at any depth: Arrow adds them for keys that only other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
