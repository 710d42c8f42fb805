"""Renders conversations with a chat template."""

from __future__ import annotations

import functools
import json
import os.path
from typing import Any, NamedTuple, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.chat import Conversation, Message, without_nulls
from dpo_jax.data.columns import DROP
from dpo_jax.types import InputError, Row

_PROBE = "dpojax"  # placeholder answer, to find the text that a template writes around answers


class Templated(NamedTuple):
    """Text of a conversation as a chat template writes it."""

    prompt: str
    answers: list[str]
    left_out: str  # end of the generation header that finished answers lack, and that `prompt` therefore lacks


def write(row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Templated:
    """Renders a conversation with the tokenizer's chat template and the row's `tools` and `chat_template_kwargs`.

    Raises: InputError if there is no template, it cannot write the messages, or it writes the prompt differently before
      an answer.
    """
    prompt, answers = conversation
    write = functools.partial(_apply, tokenizer, row.place, _options(row))
    # An assistant message that ends the prompt is continued by the answer, without a generation header between them.
    continued = prompt[-1]["role"] == "assistant"
    head = write(prompt, add_generation_prompt=not continued, continue_final_message=continued)
    wholes = [write(_joined(prompt, answer)) for answer in answers]
    start = head
    if not all(whole.startswith(head) for whole in wholes) and not continued:
        # Some templates end the generation header with text that a finished answer lacks. The prompt then ends where
        # header and finished turn differ; a placeholder answer keeps the answers' own text out of the comparison.
        turn = write([*prompt, {"role": "assistant", "content": _PROBE}])
        start = _common_tokens(tokenizer, head, turn[: turn.rfind(_PROBE)])
        if len(start) <= len(write(prompt)):
            start = head  # they differ before the end of the role
    if not all(whole.startswith(start) for whole in wholes):
        raise InputError(
            row.place,
            got="the chat template writes the prompt in another way when an answer follows",
            expected="text of prompt and answer that starts with the text of the prompt",
            remedy="Give chat_template_kwargs (such as enable_thinking) or a template with which it does.",
        )
    return Templated(start, [whole[len(start) :] for whole in wholes], head[len(start) :])


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


def _options(row: Row) -> dict[str, Any]:
    """Template arguments from the columns `tools` (a list, or JSON text of one) and `chat_template_kwargs`."""
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
    return {"tools": without_nulls(tools) or None, **without_nulls(options)}


def _apply(
    tokenizer: PreTrainedTokenizerBase, place: str, options: dict[str, Any], messages: list[Message], **form: bool
) -> str:
    """Text that the chat template writes for messages. Raises: InputError if there is no template or it fails."""
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
