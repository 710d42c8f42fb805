"""Reads conversations from the columns of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from dpo_jax.data.columns import (
    DROP,
    MEDIA,
    TEXT_ALONE,
    check_different,
    column,
    described,
    is_empty,
    is_given,
    without_nulls,
)
from dpo_jax.types import InputError, Row, Value, shown

Message = dict[str, Value]

HEADER = "\n\nAssistant:"  # last text of the prompt in an HH transcript
HUMAN = "\n\nHuman:"  # its first

# Fields of a message that templates write. Messages that differ elsewhere, such as in an id, are the same message.
_WRITTEN = ("content", "role", "tool_calls", "name", "reasoning_content", "reasoning", "thinking")
FACTORS = ("weight", "loss", "train", "training")  # fields of a message that is not trained on if one of them is 0
ROLES = ("system", "developer", "user", "assistant", "tool")  # the usual ones; templates may name others
_SAME = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "tool_response": "tool", "function_response": "tool"},
}
_CALLS = ("function_call", "tool_call")  # roles of messages whose content is the JSON text of one or several calls

_JSON = re.compile(r"\s*\[?\s*\{")
_BEGUN = re.compile(r'\s*\[\s*\{\s*"(role|from)"\s*:')
_PRINTED = re.compile(r"\s*(?:array\()?\[?\s*\{\s*'(role|content|from|value)'\s*:")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class Conversation(NamedTuple):
    """A prompt and answers to it as chat messages; each answer starts with an assistant message."""

    prompt: list[Message]
    answers: list[list[Message]]


def is_messages(value: object) -> bool:
    """Whether a value is a list, one message, or the JSON text of messages."""
    if isinstance(value, str):
        return _decoded(value) is not None
    return isinstance(value, list) or is_message(value)


def is_message(value: object) -> bool:
    """Whether a value is a chat message, of ShareGPT too."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def any_messages(values: Sequence[object]) -> bool:
    """Whether columns of a row hold messages rather than text.

    The JSON text of a single message is one only if all columns are messages, because an answer may be such text.
    """
    return any(is_messages(value) and not _is_one(value) for value in values) or all(map(is_messages, values))


def _is_one(value: object) -> bool:
    """Whether a value is text that begins as the JSON of one object."""
    return isinstance(value, str) and value.lstrip().startswith("{")


def answers(row: Row, values: Sequence[Value], names: Sequence[str]) -> list[list[Message]]:
    """Messages of each answer of a row; see `messages`. Text that only looks like a message beside others stays text.

    Raises: InputError if a value is neither text nor messages.
    """
    if any(map(_is_one, values)) and not all(map(is_messages, values)):
        values = [[_text("assistant", each)] if _is_one(each) and is_messages(each) else each for each in values]
    return [messages(row, *each, author="assistant") for each in zip(values, names, strict=True)]


def _text(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def of_pair(row: Row) -> Conversation:
    """Prompt and answers from columns chosen and rejected; the prompt is in its own column, in the answers, or in both.

    Text is the content of a user message in the prompt's column and of an assistant message in an answer's.

    Raises: InputError if the messages are damaged or do not make a prompt and two answers.
    """
    names, own = ["'chosen'", "'rejected'"], row.fields.get("prompt")
    values = [column(row, "chosen"), column(row, "rejected")]
    if own is None and all(isinstance(value, str) and HEADER in value for value in values):
        values = [_turns(row, *each) for each in zip(values, names, strict=True)]
    elif isinstance(own, str) and _begins_transcript(own):  # its last header lacks the space that answers begin with
        values = [value.strip() if isinstance(value, str) else value for value in values]
    chosen, rejected = answers(row, values, names)
    if own is not None and not isinstance(own, str) or is_messages(own):
        return after_prompt(row, [chosen, rejected], names)
    same = [_alike(a, b) for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    prompt = chosen[:shared]
    if own is None:
        return _checked(row, prompt, [chosen[shared:], rejected[shared:]], names)
    # Public data sets often repeat the question as text beside entire conversations.
    prompt = prompt or messages(row, own, "'prompt'", author="user")
    if shared and all(own.strip() != message["content"].strip() for message in prompt):
        raise InputError(
            row.place,
            got="a text in 'prompt' that is none of the messages with which 'chosen' and 'rejected' both begin",
            expected="this text among them, or answers that begin with an assistant message",
            remedy=f'Leave the column out with --config.data.columns="prompt=", or give it as messages. {DROP}',
        )
    return _checked(row, prompt, [chosen[shared:], rejected[shared:]], names)


def after_prompt(row: Row, answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    """Conversation with the prompt from its own column; answers may all repeat the prompt.

    Args:
      names: names of the answers, for errors.
    Raises: InputError if the messages are damaged, or an answer does not start with an assistant message.
    """
    prompt = messages(row, column(row, "prompt"), "'prompt'", author="user")
    size = len(prompt)
    repeated = all(len(answer) >= size and all(map(_alike, answer, prompt)) for answer in answers)
    return _checked(row, prompt, [answer[size if repeated else 0 :] for answer in answers], names)


def messages(row: Row, value: Value, name: str, *, author: str) -> list[Message]:
    """Chat messages without their null fields: a list of them, a single one, or JSON text of either.

    Keys and roles of ShareGPT become those of chat templates, parts of text are joined, and the JSON text of a call's
    arguments is decoded.

    Args:
      name: of the value, for errors.
      author: role of the message that any other text is the content of.
    Raises: InputError if the value is something else.
    """
    if isinstance(value, str):
        check_not_printed(row, value, name)
        decoded = _decoded(value)
        if decoded is None and author == "user" and _begins_transcript(value):
            decoded = _turns(row, value, name)
        value = [_text(author, value)] if decoded is None else decoded
    value = without_nulls([value] if isinstance(value, dict) else value)
    if not isinstance(value, list):
        raise InputError(
            row.place, got=f"{name} is {described(value)}", expected="text or a list of chat messages", remedy=DROP
        )
    return [_message(row, each, f"message {n} of {name}") for n, each in enumerate(value, start=1)]


def check_not_printed(row: Row, text: str, name: str) -> None:
    """Raises InputError for text that is a list of messages as Python or numpy prints it, or broken JSON of one."""
    printed = _PRINTED.match(text)
    if printed or _BEGUN.match(text) and _decoded(text) is None:
        how = "messages as Python or numpy prints them" if printed else "broken JSON of messages"
        raise InputError(
            row.place,
            got=f"{name} is text that holds {how}: {shown(text)}",
            expected="messages, or JSON text of them (json.dumps)",
            remedy="Store the column as lists of messages, in JSONL or Parquet.",
        )


def _decoded(text: str) -> Value:
    """Value of the JSON text of a message or a list of messages; None for any other text."""
    if not _JSON.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        whole = "from" in value and "value" in value or "role" in value and not value.keys().isdisjoint(_WHOLE)
        return value if whole else None
    return value if value and all(map(is_message, value)) else None


# Fields of which a message in JSON text has at least one besides its role.
_WHOLE = ("content", "tool_calls", "function_call")


def _begins_transcript(text: str) -> bool:
    """Whether a prompt is an HH transcript; the blank lines before its first header may be missing."""
    return text.startswith(HUMAN) or text.lstrip().startswith(HUMAN.lstrip()) and HEADER in text


def _turns(row: Row, transcript: str, name: str) -> list[Message]:
    """Messages of an HH transcript, without the empty one that a header at its end would start.

    Raises: InputError if other text stands before the first header.
    """
    before, *parts = _TURN.split(transcript)
    if before.strip():
        raise InputError(
            row.place,
            got=f"{name} is a transcript with the text {shown(before.strip())} before its first header",
            expected=f"{HUMAN!r} or {HEADER!r} at its beginning",
            remedy=f"Give such text in a column 'system', or --config.data.format=hh to read it as it stands. {DROP}",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def _message(row: Row, value: Value, name: str) -> Message:
    """A message with text as its content. Raises: InputError if it is damaged."""
    fields = value if isinstance(value, dict) else {}
    if "role" not in fields and "from" in fields:
        others = {key: each for key, each in fields.items() if key not in ("from", "value")}
        fields = {"role": fields["from"], **others} | ({"content": fields["value"]} if "value" in fields else {})
    role, content = fields.get("role"), fields.get("content")
    calls = fields.get("tool_calls") or fields.get("function_call")
    _check_text_alone(row, fields, name)
    if not isinstance(content, str):
        content = _content(row, role, content, name)
    if role in _CALLS:
        role, content, calls = "assistant", "", content
    elif content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise _damaged(row, value, fields, name)
    if role in ROLES and not calls and content is fields.get("content"):
        return fields
    message = {**fields, "role": _SAME.get(role.lower(), role), "content": content}
    if calls:
        message.pop("function_call", None)
        message["tool_calls"] = _calls(row, calls, name)
    return message


def _damaged(row: Row, value: Value, fields: Message, name: str) -> InputError:
    """Error for a message without a role or text; `fields` are its own under the names of chat templates."""
    got, remedy = f"{name} is {described(value)}", DROP
    if "role" in fields:
        key = "content" if isinstance(fields["role"], str) else "role"
        got = f"{name} has {f'a {key!r} that is {described(fields[key])}' if key in fields else f'no {key!r}'}"
        if key == "content" and fields.get(key) is None and isinstance(fields.get("text"), str):
            got, remedy = f"{got}, but a 'text'", "Rename the key 'text' to 'content' in the file."
    return InputError(row.place, got=got, expected='{"role": text, "content": text}', remedy=remedy)


def _check_text_alone(row: Row, fields: Message, name: str) -> None:
    """Raises InputError for a message that holds images or sound."""
    for key in MEDIA & fields.keys():
        if not is_empty(fields[key]):
            raise InputError(row.place, got=f"{name} has {key!r}", expected=TEXT_ALONE, remedy=DROP)


def _content(row: Row, role: object, content: Value, name: str) -> Value:
    """Content of a message as text: parts are joined, and the result of a tool is written as JSON.

    The content of a message that is a call stays as it is.
    """
    parts = isinstance(content, list) and bool(content) and all(map(_is_part, content))
    if role in _CALLS and not parts:
        return content
    if not parts and content is not None and isinstance(role, str) and _SAME.get(role.lower()) == "tool":
        return json.dumps(content, ensure_ascii=False)
    return _joined(row, content, name) if isinstance(content, list) else content


def _is_part(value: Value) -> bool:
    """Whether an object is a part of a message's content rather than a call or an object of a tool's result."""
    if not isinstance(value, dict):
        return False
    return isinstance(kind := value.get("type"), str) and kind != "function" or value.keys() == {"text"}


def _joined(row: Row, parts: list[Value], name: str) -> str:
    """Text of a message whose content is a list of parts. Raises: InputError if one is no text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            typed = isinstance(part, dict) and "type" in part
            what = f"of type {shown(part['type'])}" if typed else f"that is {described(part)}"
            got = f"{name} has a part {what}"
            expected = 'parts {"type": "text", "text": text} alone'
            raise InputError(row.place, got=got, expected=expected, remedy=DROP)
    return "".join(part["text"] for part in parts)


def _calls(row: Row, calls: Value, name: str) -> list[Value]:
    """Calls of a message in the form that templates read, `arguments` decoded from JSON text."""
    calls = _object(row, calls, f"{name} has a call of a tool", (dict, list)) if isinstance(calls, str) else calls
    decoded = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict):
            got, expected = (
                f"{name} has a call of a tool that is {described(call)}",
                '{"name": text, "arguments": object}',
            )
            raise InputError(row.place, got=got, expected=expected, remedy=DROP)
        if "function" not in call:
            call = {"type": "function", "function": call}
        function = call["function"]
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            what = f"{name} calls {shown(function.get('name'))} with arguments"
            arguments = _object(row, function["arguments"] or "{}", what, dict)
            call = {**call, "function": {**function, "arguments": arguments}}
        decoded.append(call)
    return decoded


def _object(row: Row, text: str, what: str, types: type | tuple[type, ...]) -> Value:
    """Value of JSON text. Raises: InputError if it is broken or of another type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, types):
        got = f"{what} in the text {shown(text)}, which is no JSON object"
        raise InputError(row.place, got=got, expected="an object, or the JSON text of one", remedy=DROP)
    return value


def _alike(one: Message, other: Message) -> bool:
    """Whether a template would write two messages the same way, but for the ids of calls."""
    return one == other or all(
        one.get(name) == other.get(name) or name == "tool_calls" and _without_ids(one) == _without_ids(other)
        for name in _WRITTEN
    )


def _without_ids(message: Message) -> list[Value]:
    """Calls of a message without their ids."""
    return [{key: each for key, each in call.items() if key != "id"} for call in message.get("tool_calls") or []]


def repeats(row: Row, conversation: Value, name: str) -> bool:
    """Whether a conversation is the one in an answer's column, but for ids and the like."""
    answer = row.fields.get(name)
    if conversation == answer:
        return True
    if not isinstance(conversation, list) or not isinstance(answer, list) or len(conversation) != len(answer):
        return False
    sides = (conversation, "the conversation"), (answer, repr(name))
    return all(map(_alike, *(messages(row, *side, author="user") for side in sides)))


def _checked(row: Row, prompt: list[Message], answers: list[list[Message]], names: Sequence[str]) -> Conversation:
    """Adds the row's system text; checks that there is a prompt, and answers: different, not empty, the assistant's."""
    prompt = _with_system(row, prompt)
    for name, answer in zip(names, answers, strict=True):
        if not answer and any(answers):
            raise InputError(row.place, got=f"{name} is empty", expected="an answer", remedy=DROP)
    if not prompt:
        got = f"no prompt: {' and '.join(names)} begin with different messages"
        got = "'prompt' is empty" if row.fields.get("prompt") is not None else got
        expected = "a column 'prompt', or messages with which both answers begin"
        raise InputError(row.place, got=got, expected=expected, remedy=DROP)
    check_different(row, answers, same=lambda one, other: len(one) == len(other) and all(map(_alike, one, other)))
    for name, answer in zip(names, answers, strict=True):
        if answer and answer[0]["role"] != "assistant":
            raise InputError(
                row.place,
                got=f"the answer in {name} begins with a message of the role {shown(answer[0]['role'])}",
                expected="the same prompt on both sides, and then a message of the assistant",
                remedy=f"{_PLAIN * any(isinstance(row.fields.get(each), str) for each in _ANSWERS)}{DROP}",
            )
        _check_scored(row, answer, name)
        if not any(m["content"].strip() or m.get("tool_calls") for m in answer if m["role"] == "assistant"):
            raise InputError(row.place, got=f"{name} is empty", expected="an answer", remedy=DROP)
    return Conversation(prompt, answers)


_ANSWERS = ("chosen", "rejected")
_PLAIN = "If the columns are text that only looks like messages, give --config.data.format=plain. "


def _check_scored(row: Row, answer: list[Message], name: str) -> None:
    """Raises InputError for an answer with a message of the assistant that is marked as not trained on."""
    for message in answer:
        for key in FACTORS:
            if message["role"] == "assistant" and message.get(key) == 0:
                raise InputError(
                    row.place,
                    got=f"{name} has a message of the assistant with {key!r} {message[key]!r}",
                    expected="answers in which all that the assistant says is trained on",
                    remedy=f"--config.data.turns=last scores the last turn alone; remove the key then. {DROP}",
                )


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Puts the text of the column `system` first. Raises: InputError if the prompt has another system message."""
    system = row.fields.get("system")
    if not is_given(system):
        return prompt
    if not isinstance(system, (str, list, dict)):
        raise InputError(row.place, got=f"'system' is {described(system)}", expected="text", remedy=DROP)
    message = system if isinstance(system, dict) else {"role": "system", "content": system}
    (message,) = messages(row, message, "'system'", author="system")
    if not prompt or prompt[0]["role"] != "system":
        return [message, *prompt]
    if prompt[0]["content"].strip() != message["content"].strip():
        raise InputError(
            row.place,
            got="a 'system' column beside a prompt with another system message",
            expected="one system message",
            remedy='Remove one of them; --config.data.columns="system=" leaves the column out.',
        )
    return prompt
