"""Brings rows as they are published into the columns that `formats` reads, and notes columns that nothing reads.

A layout makes standard columns of others. The first of ANSWERS that fits a row is read if the row has no standard
answers, then the first of SYSTEMS if it has no system text, and the first of PROMPTS if it has no prompt. Rows with
standard columns pass unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeAlias

from dpo_jax.data import chat, formats
from dpo_jax.data.columns import DROP, MEDIA, TEXT_ALONE, described, is_empty, missing, named, number
from dpo_jax.data.renaming import Renaming, replaced
from dpo_jax.types import InputError, Row, Value, shown

Fields: TypeAlias = dict[str, Value]

_REFERENCE = re.compile(r"(^|[_.-])ref(erence)?[_.-](.*[_.-])?log_?p|log_?p.*[_.-]ref(erence)?([_.-]|$)")


class Layout(NamedTuple):
    """Columns that rows of a layout have, and how standard columns are made of them."""

    name: str  # for the report
    columns: tuple[str, ...]  # none of them is null
    read: Callable[..., Fields]  # (row, *values of columns, *values of optional)
    optional: tuple[str, ...] = ()
    fits: Callable[..., bool] = lambda *_: True  # (*values of columns)


# Layouts of answers


def _openai(row: Row, chosen: Value, rejected: Value, given: Value) -> Fields:
    """Columns of a row of OpenAI's preference fine-tuning; what `input` has besides messages and tools stays apart."""
    given = given if isinstance(given, dict) else {"messages": given}
    names = {"messages": "prompt", "tools": "tools"}
    for key, name in names.items():
        one, other = given.get(key), row.fields.get(name)
        if one != other and not is_empty(one) and not is_empty(other):
            raise InputError(
                row.place,
                got=f"a column {name!r} beside other {key} in 'input'",
                expected="one of the two",
                remedy=f'Leave the column out with --config.data.columns="{name}=".',
            )
    others = {names.get(key, f"input.{key}"): value for key, value in given.items() if not is_empty(value)}
    return others | _pair(chosen, rejected)


def _pair(chosen: Value, rejected: Value) -> Fields:
    return {"chosen": chosen, "rejected": rejected}


_ANSWER_KEYS = ("completion", "response", "answer", "text", "content", "output")
_RANK_KEYS, _SCORE_KEYS = ("rank",), ("score", "overall_score", "rating", "pm_score")


def _objects(row: Row, answers: list[Fields]) -> Fields:
    """Ranking of objects that each have an answer and a rank, from 0 or 1, or a score."""
    first = answers[0]
    answer = next((key for key in _ANSWER_KEYS if key in first), "content" if _SPOKEN & first.keys() else None)
    key = next((key for key in (*_RANK_KEYS, *_SCORE_KEYS) if first.get(key) is not None), None)
    if answer is None or key is None:
        raise InputError(
            row.place,
            got=f"a list of answers, the first of which is {described(first)}",
            expected=f"in each the key of its text ({', '.join(_ANSWER_KEYS)}) and that of its rank or score "
            f"({', '.join((*_RANK_KEYS, *_SCORE_KEYS))})",
            remedy="Rename the keys in the file.",
        )
    values = [each.get(key) for each in answers]
    responses = [_answer(row, each, answer) for each in answers]
    if key in _SCORE_KEYS:
        return {"responses": responses, "scores": values}
    from_zero = any(number(value) == 0 for value in values)
    ranks = [value if (rank := number(value)) is None else rank + from_zero for value in values]
    return {"responses": responses, "ranks": ranks}


_SPOKEN = {"role", "from", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}


def _answer(row: Row, each: Fields, key: str) -> Value:
    """The answer in an object: the message that the object is, or what its key holds."""
    texts = [name for name in _ANSWER_KEYS if not is_empty(each.get(name)) and each[name] != each.get(key)]
    if texts and not is_empty(each.get(key)):
        raise InputError(
            row.place,
            got=f"an answer with different values under the keys {named([key, *texts])}",
            expected="one of these keys",
            remedy="Remove the others from the file.",
        )
    if "from" in each:
        return each
    if "role" in each or any(not is_empty(each.get(name)) for name in _SPOKEN):
        return {"role": "assistant", "content": each.get(key), **each}
    for name in MEDIA & each.keys():
        if not is_empty(each[name]):
            raise InputError(row.place, got=f"an answer with {name!r}", expected=TEXT_ALONE, remedy=DROP)
    return each.get(key)


def _are_messages(value: Value) -> bool:
    return all(map(chat.is_message, value)) if isinstance(value, list) else chat.is_messages(value)


def _are_two(values: Value) -> bool:
    return isinstance(values, list) and len(values) == 2 and all(isinstance(each, (str, list)) for each in values)


def _are_objects(values: Value, *_: Value) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(each, dict) for each in values)


def _swift(row: Row, messages: Value, rejected: Value) -> Fields:
    """A conversation that ends in the chosen answer, and another answer in place of its last message."""
    messages = chat.messages(row, messages, "the conversation", author="user")
    return {"prompt": messages[:-1]} | _pair(messages[-1:], rejected)


def _labelled(row: Row, messages: Value, label: Value) -> Fields:
    """A conversation whose last message is the completion that the label is about."""
    messages = chat.messages(row, messages, "the conversation", author="user")
    return {"prompt": messages[:-1], "completion": messages[-1:], "label": label}


def _choice(name: str, columns: tuple[str, ...], sign: Callable[..., float | None], valid: str) -> Layout:
    """Layout of two answers and the columns that say which is better: `sign` of them is > 0 for the first.

    Args:
      columns: of the answers, and then of what says which is better.
      valid: the values of these, for errors.
    """
    return Layout(name, columns, lambda row, *values: _better(row, values[:2], columns[2:], values[2:], sign, valid))


def _better(
    row: Row,
    answers: Sequence[Value],
    names: Sequence[str],
    values: Sequence[Value],
    sign: Callable[..., float | None],
    valid: str,
) -> Fields:
    first, second = answers
    better = sign(*values)
    if not better:
        got = " and ".join(f"{name!r} is {shown(value)}" for name, value in zip(names, values, strict=True))
        tie = ", so neither answer is better" if better == 0 else ""
        expected = "one answer that is better" if tie else valid
        raise InputError(row.place, got=got + tie, expected=expected, remedy=DROP)
    return _pair(first, second) if better > 0 else _pair(second, first)


def _summaries(row: Row, summaries: list[Fields], choice: Value) -> Fields:
    return _better(row, [each.get("text") for each in summaries], ["choice"], [choice], _index, "0 or 1")


def _strength(value: Value) -> float | None:
    """Sign of HelpSteer's preference: below 0 the first is better, above it the second."""
    strength = number(value)
    return None if strength is None else -strength


def _index(value: Value) -> float | None:
    index = number(value)
    return 1 - 2 * index if index in (0, 1) else None


def _flag(value: Value) -> float | None:
    flag = number(value)
    return 2 * flag - 1 if flag in (0, 1) else None


def _difference(first: Value, second: Value) -> float | None:
    values = number(first), number(second)
    return None if values[0] is None or values[1] is None else values[0] - values[1]


def _winner(value: Value) -> float | None:
    name = str(value).lower().removeprefix("model_").removeprefix("response_")
    return {"a": 1.0, "b": -1.0}.get(name, 0.0 if "tie" in name or "bad" in name else None)


_TALKS = ("messages", "conversations", "conversation")
_STRENGTHS = "a number, below 0 where the first answer is better"

ANSWERS = (
    Layout("OpenAI", ("preferred_output", "non_preferred_output"), _openai, ("input",)),
    *(Layout(name, (name,), _objects, fits=_are_objects) for name in ("completions", "answers", "responses")),
    *(
        Layout(f"chosen_{name}", (f"chosen_{name}", f"rejected_{name}"), lambda _, a, b: _pair(a, b))
        for name in ("conversations", "messages", "response", "answer", "output", "completion", "text")
    ),
    Layout("ms-swift", ("messages", "rejected_response"), _swift),
    Layout("ms-swift", ("messages", "rejected_messages"), lambda _, a, b: _pair(a, b)),
    Layout("Argilla", ("generations", "ratings"), lambda _, a, b: {"responses": a, "scores": b}),
    *(Layout("KTO", (name, tag), _labelled) for name in _TALKS for tag in ("label", "kto_tag")),
    Layout("KTO", ("output", "kto_tag"), lambda _, a, b: {"completion": a, "label": b}),
    Layout("Alpaca", ("output",), lambda _, pair: _pair(*pair), fits=_are_two),
    _choice("PKU-SafeRLHF", ("response_0", "response_1", "better_response_id"), _index, "0 or 1"),
    _choice("HelpSteer3", ("response1", "response2", "overall_preference"), _strength, _STRENGTHS),
    _choice("HelpSteer2", ("response_1", "response_2", "preference_strength"), _strength, _STRENGTHS),
    _choice("SHP", ("human_ref_A", "human_ref_B", "labels"), _flag, "0 or 1"),
    _choice("WebGPT", ("answer_0", "answer_1", "score_0", "score_1"), _difference, "two numbers"),
    Layout("summaries", ("summaries", "choice"), _summaries, fits=lambda all, _: _are_objects(all) and len(all) == 2),
    _choice("arena", ("conversation_a", "conversation_b", "winner"), _winner, "'model_a' or 'model_b'"),
    _choice("arena", ("response_a", "response_b", "winner"), _winner, "'model_a' or 'model_b'"),
)  # fmt: skip


# Layouts of prompts


def _talk(row: Row, messages: Value) -> Fields:
    # Data sets for several methods repeat an answer's whole conversation for fine-tuning.
    repeated = any(chat.repeats(row, messages, name) for name in ("chosen", "rejected"))
    return {} if repeated else {"prompt": messages}


def _instruction(row: Row, instruction: str, given: Value, history: Value, system: Value) -> Fields:
    """Prompt of an Alpaca row: instruction, then `input` on a line of its own; a column `system` makes it a message."""
    if not is_empty(given) and not isinstance(given, str):
        got = f"'input' is {described(given)} beside 'instruction'"
        remedy = f'Leave the column out with --config.data.columns="input=", or name the prompt\'s. {DROP}'
        raise InputError(row.place, got=got, expected="text", remedy=remedy)
    prompt = instruction if is_empty(given) else f"{instruction}\n{given}"
    return {"system": system} | (_history(row, prompt, history) if history else {"prompt": prompt})


def _history(row: Row, prompt: Value, history: Value) -> Fields:
    """Prompt after earlier turns, which are messages or pairs of question and answer."""
    turns = history
    if isinstance(history, list) and all(isinstance(each, list) and len(each) == 2 for each in history):
        turns = [{"role": role, "content": each} for turn in history for role, each in zip(_SIDES, turn, strict=True)]
    messages = chat.messages(row, turns, "'history'", author="user")
    return {"prompt": messages + chat.messages(row, prompt, "'prompt'", author="user")}


_SIDES = ("user", "assistant")

PROMPTS = (
    Layout("history", ("prompt", "history"), _history, fits=lambda _, history: not is_empty(history)),
    *(
        Layout("ShareGPT" if name == "conversations" else name, (name,), _talk, fits=_are_messages)
        for name in (*_TALKS, "context", "trajectory")
    ),
    Layout(
        "Alpaca", ("instruction",), _instruction, ("input", "history", "system"),
        fits=lambda instruction: isinstance(instruction, str),
    ),
    *(
        Layout(name, (name,), lambda _, value: {"prompt": value}, fits=lambda value: isinstance(value, (str, list)))
        for name in ("question", "query", "input", "history")
    ),
    Layout(
        "WebGPT", ("question",), lambda _, question: {"prompt": question["full_text"]},
        fits=lambda question: isinstance(question, dict) and "full_text" in question,
    ),
)  # fmt: skip

SYSTEMS = tuple(
    Layout(name, (name,), lambda _, value: {"system": value}, fits=lambda value: isinstance(value, str))
    for name in ("system_prompt", "system_message")
)

COLUMNS = {name for layout in (*ANSWERS, *SYSTEMS, *PROMPTS) for name in (*layout.columns, *layout.optional)}


class _Plan(NamedTuple):
    """Layouts that rows with certain columns may have, and those of the columns that must not be ignored."""

    answers: tuple[Layout, ...]
    systems: tuple[Layout, ...]
    prompts: tuple[Layout, ...]
    refused: tuple[str, ...]
    standard: bool  # the columns hold answers in a standard format


class Reader:
    """Reads the rows of one source, and notes which layouts and which unread columns they have."""

    def __init__(self, renaming: Renaming):
        self.renaming = renaming
        self.layouts: dict[str, None] = {}  # names of the layouts, in the order in which they were met
        self.unread: dict[str, None] = {}  # names of the columns with a value that nothing reads
        self._plans: dict[tuple[str, ...], _Plan] = {}

    def read(self, row: Row) -> Row:
        """Returns the row with the columns that `formats` reads.

        Raises: InputError if the row has no answers in a known layout, a layout's columns are damaged, or a column
          holds images or reference log-probs under a name that nothing reads.
        """
        self.unread.update(dict.fromkeys(self.renaming.replaced(row)))
        as_written = row = self.renaming.apply(row)
        names = tuple(row.fields)
        if (plan := self._plans.get(names)) is None:
            plan = self._plans[names] = _planned(names)
        for name in plan.refused:
            _refuse(row, name)
        if plan.answers and not _has_answers(row.fields):
            row = self._laid_out(row, plan.answers)
        if plan.systems and is_empty(row.fields.get("system")):
            row = self._laid_out(row, plan.systems)
        if plan.prompts:
            without_prompt = row.fields.get("prompt") is None
            row = self._laid_out(row, [each for each in plan.prompts if without_prompt or "prompt" in each.columns])
        if not plan.standard and not row.fields.keys() & {"responses", "completion"}:
            for name in ("chosen", "rejected"):
                if name not in row.fields:
                    raise missing(as_written, name)
        return row

    def _laid_out(self, row: Row, layouts: Collection[Layout]) -> Row:
        """Row with standard columns in place of those of the first layout that fits."""
        for layout in layouts:
            values = [row.fields.get(name) for name in layout.columns]
            if all(value is not None for value in values) and layout.fits(*values):
                self.layouts[layout.name] = None
                standard = layout.read(row, *values, *(row.fields.get(name) for name in layout.optional))
                used = {*layout.columns, *layout.optional}
                others = {name: value for name, value in row.fields.items() if name not in used}
                standard = {name: value for name, value in standard.items() if value is not None or name not in others}
                for name in standard.keys() & others.keys():
                    if not is_empty(others[name]) and others[name] != standard[name]:
                        self.unread[replaced(name, layout.columns[0])] = None
                return Row(row.place, others | standard)
        return row

    def note(self, row: Row, format: str) -> None:
        """Notes the columns of a row from `read` that nothing reads in this format and that are not empty."""
        read = formats.columns_read(row, format)
        for name, value in row.fields.items():
            if name not in read and name not in self.unread and not is_empty(value):
                self.unread[name] = None


def _planned(names: Collection[str]) -> _Plan:
    """Plan for rows with these columns."""
    answers, systems, prompts = (
        tuple(each for each in layouts if set(names).issuperset(each.columns))
        for layouts in (ANSWERS, SYSTEMS, PROMPTS)
    )
    others = [name for name in names if name not in formats.REFERENCE]
    refused = tuple(name for name in others if name.lower() in MEDIA or _REFERENCE.search(name.lower()))
    standard = any(set(names).issuperset(each) for each in _STANDARD)
    return _Plan(answers, systems, prompts, refused, standard)


def _has_answers(fields: Fields) -> bool:
    """Whether a row has the answers of one of the standard formats."""
    given = {name for name, value in fields.items() if value is not None}
    return any(given.issuperset(names) for names in _STANDARD)


_STANDARD = (("chosen", "rejected"), ("completion", "label"), ("responses", "scores"), ("responses", "ranks"))


def _refuse(row: Row, name: str) -> None:
    """Raises InputError if a column that must not be ignored has a value."""
    if is_empty(row.fields[name]):
        return
    if name.lower() in MEDIA:
        raise InputError(
            row.place,
            got=f"the column {name!r} is not empty",
            expected=TEXT_ALONE,
            remedy=f'Drop the row, or give --config.data.columns="{name}=" to train without what the column holds.',
        )
    others = [each for each in row.fields if _REFERENCE.search(each.lower()) and each not in formats.REFERENCE]
    sides = [[each for each in others if side in each.lower()] for side in ("chosen", "rejected")]
    mapped = ",".join(f"{target}={side[0]}" for target, side in zip(formats.REFERENCE, sides, strict=True) if side)
    reads = f'To use them, give --config.data.columns="{mapped}". ' if all(sides) else ""
    leaves = ",".join(f"{each}=" for each in others)
    raise InputError(
        row.place,
        got=f"reference log-probs in the column {name!r}",
        expected=" and ".join(map(repr, formats.REFERENCE)) + ", sums over the tokens of an answer in nats, or none",
        remedy=f'{reads}To have them computed, give --config.data.columns="{leaves}".',
    )
