"""Formats of preference rows, and their rendering as text of a prompt and its answers."""

from __future__ import annotations

import dataclasses
import os.path
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_jax.data import chat, templates
from dpo_jax.data.chat import HEADER, HUMAN
from dpo_jax.data.columns import (
    DROP,
    as_text,
    check_characters,
    check_different,
    column,
    described,
    is_given,
    number,
    text,
)
from dpo_jax.data.templates import TemplateLoss
from dpo_jax.data.weights import weighed
from dpo_jax.types import InputError, Pair, Row, Spans, shown

FORMATS = ("plain", "chat", "hh", "ranked", "unpaired")
RANKINGS = ("all", "best", "whole")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_WITHOUT_REFERENCE = f"--config.data.columns={','.join(f'{name}=' for name in REFERENCE)}"
_OF_PAIRS = {"prompt", "chosen", "rejected", *REFERENCE}
_OF_MESSAGES = {"system", "tools", "chat_template_kwargs"}
_OF_ALL = {"weight", "margin"}
# Columns that are read, of text and of messages.
_READ = {
    "plain": _OF_PAIRS,
    "hh": _OF_PAIRS,
    "chat": _OF_PAIRS,
    "ranked": {"prompt", "responses", "scores", "ranks"},
    "unpaired": {"prompt", "completion", "label"},
}
_READ_OF_TEXT = {format: frozenset(names | _OF_ALL) for format, names in _READ.items()}
_READ_OF_MESSAGES = {format: frozenset(names | _OF_ALL | _OF_MESSAGES) for format, names in _READ.items()}
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def detect(row: Row) -> str:
    """Detects the format of a row.

    `chat` for messages or a `system` column, `plain` for text with a prompt column, `hh` for HH transcripts, `ranked`
    for a list of responses, `unpaired` for a single completion. Raises: InputError if it is none of them.
    """
    if any(row.fields.get(name) is None for name in ("chosen", "rejected")):
        for name, format in (("responses", "ranked"), ("completion", "unpaired")):
            if row.fields.get(name) is not None:
                return format
    values = [column(row, name) for name in ("chosen", "rejected")]
    own = row.fields.get("prompt")
    if "system" in row.fields or chat.any_messages(values if own is None else [own, *values]):
        return "chat"
    texts = [as_text(row, value, repr(name)) for value, name in zip(values, ("chosen", "rejected"), strict=True)]
    if row.fields.get("prompt") is not None:
        return "plain"
    if all(HEADER in each for each in texts):
        return "hh"
    for name, each in zip(("'chosen'", "'rejected'"), texts, strict=True):
        chat.check_not_printed(row, each, name)
    raise InputError(
        row.place,
        got="answers as text, and no column 'prompt'",
        expected=f"that column, or transcripts with {HEADER!r} before each answer",
        remedy='Name the column of the prompt, --config.data.columns="prompt=COLUMN", or add one: text does not show '
        "where an answer begins.",
    )


def known_columns() -> set[str]:
    """Returns the names of all columns that rows of some format are read from."""
    return set().union(*_READ_OF_MESSAGES.values())


def columns_read(row: Row, format: str) -> frozenset[str]:
    """Names of the columns that rows like this one are read from, missing ones included."""
    return (_READ_OF_MESSAGES if _holds_messages(row, format) else _READ_OF_TEXT)[format]


def kind_of(format: str, rankings: str) -> str:
    """Kind of pairs that rows of a format become: `paired`, `unpaired` or, if rankings stay whole, `ranked`."""
    if format == "ranked" and rankings == "whole":
        return "ranked"
    return "unpaired" if format == "unpaired" else "paired"


def render(
    row: Row,
    *,
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    rankings: str = "all",
    turns: str = "assistant",
    date: str = "",
    drop: int = 0,
) -> list[Pair]:
    """Renders the preferences of a row as text: one pair, or several from a ranking.

    plain: columns prompt, chosen, rejected, used unchanged; no separator is put between them.
    hh: columns chosen, rejected, each the entire transcript. The prompt ends with the last `"\\n\\nAssistant:"` before
      the first difference, wherever inside the answers that difference is. Turns of the human in
      answers are not scored.
    chat: the same columns as messages, with or without a prompt, written out by the tokenizer's chat template. Text is
      a user message in the prompt and an assistant message in an answer; HH transcripts become their turns. The
      generation header belongs to the prompt; an answer continues an assistant message that ends the prompt. Optional
      columns `system`, `tools`, `chat_template_kwargs`; null keys in any of these count as absent.
    ranked: columns prompt, responses (a list of at least two), and a number for each: in `scores` (higher is better)
      or in `ranks` (from 1, the best).
    unpaired: columns prompt, completion, label (true for a desirable completion). The other answer is left empty.

    Ranked and unpaired rows are text, or become it as in chat if prompt or answers are messages or the row has a column
    `system`.

    Columns `ref_chosen_logps` and `ref_rejected_logps` of pairs are passed on, and so are `weight` of all rows and
    `margin` of pairs. `columns_read` names all that are read.

    Args:
      format: one of FORMATS; every row must be of it.
      tokenizer: for its chat template.
      turns, date: see `templates.Templating`.
      drop: exchanges at the start of a conversation's prompt that are left out, see `templates.drop_oldest`.
      rankings: pairs made of a ranking. all: every two answers of which one is better; best: the best answer with each
        worse one; whole: one item with all answers, whose order must be defined.
    Raises: TemplateLoss for a row whose answers are empty or equal once the template has left out part of them;
      InputError for a row of another format, an empty answer, two equal answers, one reference column without the
      other or reference columns without a pair, a weight or margin that cannot be used, a ranking with too few or
      invalid numbers, or a conversation that the template cannot write.
    """
    if format not in FORMATS:
        raise InputError(
            "config.data.format", got=repr(format), expected=f"one of {', '.join(FORMATS)}", remedy="Name one of these."
        )
    conversation = _conversation(row, format)
    if conversation is None:
        prompt, *answers = _texts(row, format)
        spoken = _spoken if format == "hh" and turns != "all" else _whole
        spans = [spoken(answer) for answer in answers]
        written = Written(prompt, answers, [each[-1:] if turns == "last" else each for each in spans])
    else:
        conversation = conversation._replace(prompt=templates.drop_oldest(conversation.prompt, drop))
        templated = templates.write(row, conversation, templates.Templating(tokenizer, turns, date))
        written = Written(
            templated.prompt,
            templated.answers,
            templated.scored,
            {
                "templated": True,
                "omissions": tuple(templated.omissions),
                "unread": templated.unread,
                "droppable": templates.droppable(conversation.prompt),
            },
        )
    _check_written(row, written, _names(format, len(written.answers)))
    if format == "ranked":
        return weighed(row, _of_ranking(row, written, rankings), instead="a ranking")
    if format == "unpaired":
        _check_no_reference(row, "one completion")
        pair = written.pair(row, (0, None) if _is_desirable(row) else (None, 0))
        return weighed(row, [pair], instead="one completion")
    return weighed(row, [dataclasses.replace(written.pair(row, (0, 1)), reference=_reference(row))])


class Written(NamedTuple):
    """Prompt and answers of a row as text, in the row's order."""

    prompt: str
    answers: list[str]
    scored: Sequence[Spans]  # the parts of each answer that are scored
    fields: Mapping[str, Any] = MappingProxyType({})  # further fields of its pairs

    def pair(self, row: Row, order: Sequence[int | None]) -> Pair:
        """Returns the pair of these answers, best first; None: a missing answer."""
        answers = ["" if i is None else self.answers[i] for i in order]
        scored = tuple(() if i is None else self.scored[i] for i in order)
        if all(spans == ((0, len(answer)),) for spans, answer in zip(scored, answers, strict=True) if answer):
            scored = ()
        chosen, rejected, *others = answers
        return Pair(row.place, self.prompt, chosen, rejected, tuple(others), scored=scored, **self.fields)


def _check_written(row: Row, written: Written, names: Sequence[str]) -> None:
    """Raises InputError for answers that are empty or equal, TemplateLoss if the template made them so."""
    try:
        for name, answer in zip(names, written.answers, strict=True):
            if not answer.strip():
                raise InputError(row.place, got=f"{name} is empty", expected="an answer", remedy=DROP)
        check_different(row, written.answers)
    except InputError as error:
        omissions = written.fields.get("omissions", ())
        if not omissions:
            raise
        raise TemplateLoss.of(error, omissions) from error
    for each in (written.prompt, *written.answers):
        check_characters(row, each)


def header_left_out(row: Row, *, format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the end of the generation header that the template does not write before a finished answer.

    An example is `<think>\\n` in DeepSeek-R1's template: generation starts after it, but training text lacks it. Empty
    for most templates, and for text.

    Raises: as `render`.
    """
    conversation = _conversation(row, format)
    return "" if conversation is None else templates.write(row, conversation, templates.Templating(tokenizer)).left_out


def _names(format: str, count: int) -> list[str]:
    """Names of the answers in a row, for errors."""
    if format == "ranked":
        return [f"response {n}" for n in range(1, count + 1)]
    return ["'completion'"] if format == "unpaired" else ["'chosen'", "'rejected'"]


def _conversation(row: Row, format: str) -> chat.Conversation | None:
    """Messages of a row; None if it holds text."""
    if format == "chat":
        return chat.of_pair(row)
    if not _holds_messages(row, format):
        return None
    answers = _responses(row) if format == "ranked" else [column(row, "completion")]
    names = _names(format, len(answers))
    return chat.after_prompt(row, chat.answers(row, answers, names), names)


def _holds_messages(row: Row, format: str) -> bool:
    """Whether a row is a conversation, which a chat template writes; otherwise it holds text."""
    if format not in ("ranked", "unpaired"):
        return format == "chat"
    answers = row.fields.get("responses") if format == "ranked" else [row.fields.get("completion")]
    values = [row.fields.get("prompt"), *(answers if isinstance(answers, list) else [])]
    return "system" in row.fields or chat.any_messages(values)


def _texts(row: Row, format: str) -> tuple[str, ...]:
    """Prompt and answers of a row that holds text. Raises: InputError if it has what only a chat template writes."""
    if is_given(row.fields.get("system")):
        raise InputError(
            row.place,
            got=f"a column 'system', and config.data.format is {format!r}",
            expected="no system text, because no chat template is applied",
            remedy='Give --config.data.format=chat, or leave the column out with --config.data.columns="system=".',
        )
    texts = _texts_of(row, format)
    for name, each in zip(("'prompt'", *_names(format, len(texts) - 1)), texts, strict=True):
        chat.check_not_printed(row, each, name)
    return texts


def _texts_of(row: Row, format: str) -> tuple[str, ...]:
    if format == "hh":
        return _transcript(row)
    if format == "plain":
        return text(row, "prompt"), text(row, "chosen"), text(row, "rejected")
    if format == "unpaired":
        return text(row, "prompt"), text(row, "completion")
    prompt, responses = text(row, "prompt"), _responses(row)
    names = _names(format, len(responses))
    return prompt, *(as_text(row, *each) for each in zip(responses, names, strict=True))


def _responses(row: Row) -> list[Any]:
    """Values of the column `responses`. Raises: InputError if they are fewer than two."""
    value = column(row, "responses")
    if not isinstance(value, list) or len(value) < 2:
        count = f"'responses' holds {'one response' if value else 'no response'}" if isinstance(value, list) else ""
        got = count or f"'responses' is {described(value)}"
        raise InputError(row.place, got=got, expected="a list of at least two", remedy=DROP)
    return value


def _of_ranking(row: Row, written: Written, rankings: str) -> list[Pair]:
    """Pairs of a ranking, or one item with all its answers."""
    _check_no_reference(row, "a ranking")
    name, values = _values(row, len(written.answers))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # ties in the order of the row
    if rankings == "whole":
        for i, j in zip(order, order[1:], strict=False):
            if values[i] == values[j]:
                raise InputError(
                    row.place,
                    got=f"responses {i + 1} and {j + 1} have equal {name}: their order is not defined",
                    expected=f"different {name}, because the loss reads whole rankings",
                    remedy=DROP,
                )
        return [written.pair(row, order)]
    better = order[:1] if rankings == "best" else order
    pairs = [(i, j) for i in better for j in order if values[i] > values[j]]
    if not pairs:
        raise InputError(row.place, got=f"all {name} are equal", expected="one response above another", remedy=DROP)
    return [written.pair(row, pair) for pair in pairs]


def _values(row: Row, count: int) -> tuple[str, list[float]]:
    """Name of the column that orders the answers of a ranking, and numbers that are larger for better answers."""
    present = [name for name in ("scores", "ranks") if row.fields.get(name) is not None]
    if len(present) != 1:
        got = "both 'scores' and 'ranks'" if present else "neither 'scores' nor 'ranks'"
        remedy = 'Leave one out with --config.data.columns="ranks=".' if present else DROP
        raise InputError(row.place, got=got, expected="one of the two", remedy=remedy)
    (name,) = present
    values = row.fields[name]
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} {name}" if isinstance(values, list) else f"{described(values)} as {name!r}"
        raise InputError(row.place, got=f"{got} for {count} responses", expected="a list of one for each", remedy=DROP)
    numbers = [converted for value in values if (converted := number(value)) is not None]
    if len(numbers) < count:
        wrong = next(value for value in values if number(value) is None)
        raise InputError(row.place, got=f"{shown(wrong)} in {name!r}", expected="numbers", remedy=DROP)
    if name == "scores":
        return name, numbers
    if any(value < 1 or value % 1 for value in numbers):  # such as scores under the wrong name
        got = f"ranks {', '.join(f'{value:g}' for value in numbers)}"
        raise InputError(row.place, got=got, expected="whole numbers from 1, the best", remedy=DROP)
    return name, [-value for value in numbers]


def _is_desirable(row: Row) -> bool:
    """Label of an unpaired completion. Raises: InputError if it is neither true nor false."""
    value = column(row, "label")
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise InputError(row.place, got=f"'label' is {shown(value)}", expected="true or false (or 1 or 0)", remedy=DROP)
    return label


def _check_no_reference(row: Row, what: str) -> None:
    """Raises InputError if a row that holds `what`, which is no pair, has reference columns."""
    for name in REFERENCE:
        if is_given(row.fields.get(name)):
            raise InputError(
                row.place,
                got=f"{name!r} beside {what}",
                expected="reference log-probabilities only in rows with a chosen and a rejected answer",
                remedy=f"Leave them out with {_WITHOUT_REFERENCE}; they are then computed.",
            )


def _reference(row: Row) -> tuple[float, float] | None:
    """Reference log-probabilities given with the row, in nats; None if it has none."""
    columns = [value if is_given(value := row.fields.get(name)) else None for name in REFERENCE]
    if columns == [None, None]:
        return None
    values: list[float] = []
    for name, value in zip(REFERENCE, columns, strict=True):
        logp = number(value)
        if logp is None:
            raise InputError(
                row.place,
                got=f"no {name!r} beside the other one" if value is None else f"{name!r} is {shown(value)}",
                expected=f"{' and '.join(REFERENCE)}, a number each, or neither",
                remedy=f"Correct them, or leave both out with {_WITHOUT_REFERENCE}.",
            )
        values.append(logp)
    return values[0], values[1]


def _whole(answer: str) -> Spans:
    """The range of the entire answer."""
    return ((0, len(answer)),)


def _spoken(answer: str) -> Spans:
    """Ranges of the assistant's turns in the answer of an HH transcript, which may go on with turns of the human."""
    edges = [0]
    for header in re.finditer(f"{HUMAN}|{HEADER}", answer):
        if (header[0] == HUMAN) == bool(len(edges) % 2):
            edges.append(header.start() if header[0] == HUMAN else header.end())
    edges += [len(answer)] * (len(edges) % 2)
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if answer[a:b].strip())


def _transcript(row: Row) -> tuple[str, str, str]:
    """Splits two HH transcripts into the prompt they share and their answers."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if row.fields.get("prompt") is not None:
        raise InputError(
            row.place,
            got="a column 'prompt', and config.data.format is 'hh'",
            expected="transcripts, which begin with the prompt",
            remedy='Give --config.data.format=plain, or leave the column out with --config.data.columns="prompt=".',
        )
    # The common beginning may extend far into the answers, and even into later turns of a longer one.
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(HEADER) + len(HEADER)
    if end < len(HEADER):
        raise InputError(
            row.place,
            got=f"no {HEADER!r} that both texts share",
            expected="two transcripts with the same prompt",
            remedy=DROP,
        )
    return shared[:end], chosen[end:], rejected[end:]
