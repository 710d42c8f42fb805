"""Rows as they are published: every layout becomes the same pair, and every column is read, refused or named."""

import json

import pytest

from dpo_jax.data import formats, published
from dpo_jax.data.renaming import Renaming
from dpo_jax.types import InputError, Row
from tests.support.tokenizers_made import CHATML, make_tokenizer

TOKENIZER = make_tokenizer(template=CHATML)
USER = {"role": "user", "content": "Is the sky blue?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
HUMAN = {"from": "human", "value": "Is the sky blue?"}
GPT_YES, GPT_NO = {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
ASKED = "<|im_start|>user\nIs the sky blue?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe terse.<|im_end|>\n"
TEXTS = {"chosen": "yes", "rejected": "no"}


def reader(columns=""):
    standard = formats.known_columns()
    return published.Reader(Renaming(columns, known=standard | published.COLUMNS, standard=standard))


def read(fields, columns="", format="auto"):
    """The pairs of a row, as (prompt, chosen, rejected); and the reader, which noted its columns."""
    own = reader(columns)
    row = own.read(Row("a:1", fields))
    format = formats.detect(row) if format == "auto" else format
    own.note(row, format)
    pairs = formats.render(row, format=format, tokenizer=TOKENIZER)
    return [(pair.prompt, *(answer.removesuffix("<|im_end|>\n") for answer in pair.answers)) for pair in pairs], own


def failure(fields, columns="", **options):
    with pytest.raises(InputError) as caught:
        read(fields, columns, **options)
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]},
        {"input": {"messages": [USER]}, "tools": None, "preferred_output": [YES], "non_preferred_output": [NO]},
        {"prompt": [USER], "preferred_output": [YES], "non_preferred_output": [NO]},
        {"messages": [USER, YES | {"id": 1}], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "responses": [{**YES, "score": 2}, {**NO, "score": 1}]},
        {"prompt": [USER], "completions": [{"completion": "no", "rank": 1}, {**GPT_YES, "rank": 0}]},
        {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
        {"conversations": [HUMAN], "chosen": "yes", "rejected": "no"},
        {"chosen": [HUMAN, GPT_YES], "rejected": [HUMAN, GPT_NO]},
        {"instruction": USER["content"], "input": "", **TEXTS},
        {"instruction": "Is the sky", "input": "blue?", "output": ["yes", "no"]},
        {"messages": [USER], "chosen": YES, "rejected": NO},
        {"messages": [USER], "chosen": [YES], "rejected": [NO]},
        {"conversation": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], **TEXTS},
        {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"context": [USER], "completions": [{"rank": 1, "completion": [NO]}, {"rank": 0, "completion": [YES]}]},
        {"context": [USER], "response1": "no", "response2": "yes", "overall_preference": 2},
        {"messages": [USER, YES], "rejected_response": "no"},
        {"messages": [USER, YES], "rejected_messages": [USER, NO]},
        {"chosen_conversations": [USER, YES], "rejected_conversations": [USER, NO]},
        {"conversation_a": [USER, NO], "conversation_b": [USER, YES], "winner": "model_b"},
        {
            "instruction": USER["content"],
            "completions": [{"response": "yes", "overall_score": 7}, {"response": "no", "overall_score": 1}],
        },
        {"instruction": USER["content"], "generations": ["no", "yes"], "ratings": [1, 5]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([YES]), "rejected": json.dumps(NO)},
        {"system": "", "question": USER["content"], **TEXTS},
        {"system": None, "prompt": USER["content"], **TEXTS},
    ],
)
def test_layouts_of_conversations_become_the_same_pair(fields):
    pairs, own = read(fields)
    assert pairs == [
        ("Is the sky\nblue?".join(ASKED.split(USER["content"])) if "output" in fields else ASKED, "yes", "no")
    ]
    assert not own.unread


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "q", **TEXTS},
        {"input": "q", **TEXTS},
        {"prompt": "q", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        {"prompt": "q", "response_1": "yes", "response_2": "no", "preference_strength": -1},
        {"history": "q", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1},
        {"question": {"full_text": "q"}, "answer_0": "no", "answer_1": "yes", "score_0": -0.5, "score_1": 0.5},
        {"prompt": "q", "response_a": "yes", "response_b": "no", "winner": "model_a"},
        {"prompt": "q", "answers": [{"answer": "yes", "rank": 1.0}, {"answer": "no", "rank": 2.0}]},
        {"prompt": "q", "summaries": [{"text": "no"}, {"text": "yes"}], "choice": 1},
        {"prompt": "q", "chosen_response": "yes", "rejected_response": "no"},
    ],
)
def test_layouts_of_text_become_the_same_pair(fields):
    pairs, own = read(fields)
    assert pairs == [("q", "yes", "no")] and not own.unread


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({"messages": [USER, YES], "label": True}, 1),
        ({"conversations": [HUMAN, GPT_YES], "kto_tag": False}, 2),
        ({"instruction": USER["content"], "output": "yes", "kto_tag": True}, 1),
    ],
)
def test_layouts_of_labelled_answers_become_unpaired_examples(fields, side):
    ((prompt, *answers),), _ = read(fields)
    assert prompt == ASKED and answers[side - 1] == "yes" and not answers[2 - side]


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "Be terse.", "question": USER["content"], **TEXTS},
        {"system": "Be terse.", "input": USER["content"], **TEXTS},
        {"system": "Be terse.", "instruction": USER["content"], **TEXTS},
        {"system_prompt": "Be terse.", "prompt": USER["content"], **TEXTS},
        {"system": "Be terse.", "prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {
            "system": "Be terse.",
            "prompt": [{"role": "system", "content": "Be terse."}, USER],
            "chosen": [YES],
            "rejected": [NO],
        },
        {"system": "Be terse.", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"system": "Be terse.", "prompt": USER["content"], "responses": ["yes", "no"], "scores": [2, 1]},
    ],
)
def test_system_text_is_the_first_message(fields):
    assert read(fields)[0] == [(SYSTEM + ASKED, "yes", "no")]


def test_system_text_that_cannot_be_written_is_refused():
    other = {"system": "Be terse.", "prompt": [{"role": "system", "content": "Be long."}, USER], **TEXTS}
    assert "another system message" in failure(other).got
    assert read(other, "system=")[0][0][0].startswith("<|im_start|>system\nBe long.")
    assert (
        "a column 'system', and config.data.format is 'plain'"
        in failure({"system": "Be terse.", "prompt": "q", **TEXTS}, format="plain").got
    )


@pytest.mark.parametrize(
    "history", [[["Hi.", "Hello."]], [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]]
)
@pytest.mark.parametrize("name", ["prompt", "instruction"])
def test_earlier_turns_stand_before_the_prompt(name, history):
    ((prompt, *_),), _ = read({name: USER["content"], "history": history, **TEXTS})
    assert prompt == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" + ASKED


def test_alpaca_rows_are_text_if_the_format_says_so():
    assert read({"instruction": "a", "input": "b", **TEXTS}, format="plain")[0] == [("a\nb", "yes", "no")]


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "'better_response_id' is 2"),
        (
            {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0},
            "is 0, so neither answer is better",
        ),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie"}, "'winner' is 'tie', so neither"),
        ({"prompt": "q", "answers": [{"words": "a"}]}, "the first of which is an object with the keys 'words'"),
        (
            {"good": "a", "dispreferred": "b", "question": "q"},
            "no 'chosen' among the columns 'good', 'dispreferred', 'question'",
        ),
        ({"prompt": "q", "chosen": "a", "images": ["x.png"]}, "'images' is not empty"),
        ({"prompt": "q", "answers": [{"text": "a", "output": "b", "rank": 1}]}, "under the keys 'text', 'output'"),
        ({"prompt": "q", "answers": [{"text": "a", "image": "x.png", "rank": 1}]}, "an answer with 'image'"),
        ({"instruction": "q", "input": ["a"], **TEXTS}, "'input' is a list beside 'instruction'"),
        (
            {
                "input": {"messages": [USER], "tools": [1]},
                "tools": [2],
                "preferred_output": [YES],
                "non_preferred_output": [NO],
            },
            "a column 'tools' beside other tools in 'input'",
        ),
        ({"prompt": "q", "reference_chosen_logps": -1.0, **TEXTS}, "log-probs in the column 'reference_chosen_logps'"),
        ({"prompt": "q", "chosen_ref_logp": -1.0, **TEXTS}, "log-probs in the column 'chosen_ref_logp'"),
    ],
)
def test_read_says_what_it_cannot_read(fields, got):
    error = failure(fields)
    assert got in error.got and error.place == "a:1"


def test_answers_that_are_messages_keep_their_calls_and_reasoning():
    spoken = {"content": "yes", "reasoning_content": "Rayleigh", "tool_calls": [{"name": "f", "arguments": {}}]}
    scored = [{**spoken, "score": 2, "model": "m"}, {"content": "no", "score": 1}]
    row = reader().read(Row("a:1", {"prompt": [USER], "completions": scored}))
    assert row.fields["responses"] == [{"role": "assistant", **scored[0]}, "no"]


def test_tools_beside_the_input_of_a_row_are_kept():
    tools = [{"name": "look"}]
    fields = {"tools": tools, "preferred_output": [YES], "non_preferred_output": [NO]}
    for given in ({"messages": [USER]}, {"messages": [USER], "tools": []}, {"messages": [USER], "tools": tools}):
        assert reader().read(Row("a:1", {"input": given, **fields})).fields["tools"] == tools


def test_columns_in_place_of_which_others_are_read_are_named():
    assert list(read({"prompt": "x", "real": "q", **TEXTS}, "prompt=real")[1].unread) == ["prompt (replaced by real)"]
    assert not read({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen=rejected,rejected=chosen")[1].unread
    fields = {"prompt": "q", "chosen": "model_a", "response_a": "yes", "response_b": "no", "winner": "model_a"}
    assert list(read(fields)[1].unread) == ["chosen (replaced by response_a)"]


def test_unknown_columns_come_with_a_mapping_that_reads_them():
    fields = {"question": "q", "good": "a", "dispreferred": "b", "good_score": 3}
    remedy = failure(fields).remedy
    assert read(fields, remedy.split('"')[1])[0] == [("q", "a", "b")]
    fields = {"prompt": "q", "reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0, **TEXTS}
    _, reads, _, leaves, _ = failure(fields).remedy.split('"')
    assert reads == "ref_chosen_logps=reference_chosen_logps,ref_rejected_logps=reference_rejected_logps"
    assert not read(fields, reads)[1].unread and not read(fields, leaves)[1].unread


def test_columns_that_nothing_reads_are_noted_if_they_have_a_value():
    rows = [
        {"prompt": "q", **TEXTS, "scores": [1, 2], "id": "", "tags": [], "images": [], "flag": None, "weight": 2},
        {"prompt": "q", **TEXTS, "flag": False, "tools": [{"name": "f"}], "preferred_logps": 1.0},
    ]
    own = reader()
    for row in rows:
        own.note(own.read(Row("a:1", row)), "plain")
    assert list(own.unread) == ["scores", "flag", "tools", "preferred_logps"]
    _, own = read({"prompt": [USER], **TEXTS, "tools": [], "chat_template_kwargs": {"a": 1}, "completion": "x"})
    assert list(own.unread) == ["completion"]
    _, own = read(
        {
            "input": {"messages": [USER], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        }
    )
    assert list(own.unread) == ["input.parallel_tool_calls"] and list(own.layouts) == ["OpenAI"]


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"question": "q", "a": "yes", "b": "no"}, "prompt=question,chosen=a, rejected = b"),
        ({"prompt": "q", "chosen": "no", "rejected": "yes"}, "chosen=rejected,rejected=chosen"),
        ({"prompt": "x", "real": "q", **TEXTS}, "prompt=real"),
        (
            {"q": {"text": "q"}, "good": {"text": "yes"}, "bad": {"text": "no"}},
            "prompt=q.text,chosen=good.text,rejected=bad.text",
        ),
        ({"prompt": "q", "images": ["x"], **TEXTS}, "images="),
        ({"prompt": "q", "a.b": "yes", "rejected": "no"}, "chosen=a.b"),
    ],
)
def test_columns_are_read_under_other_names(fields, columns):
    assert read(fields, columns)[0] == [("q", "yes", "no")]


@pytest.mark.parametrize(
    ("columns", "got"),
    [
        ("promt=question", "'promt' before the =, a name that nothing reads"),
        ("prompt=a,prompt=b", "'prompt' twice"),
        ("prompt", "'prompt'"),
        ("=a", "'=a'"),
        ("prompt=a=b", "'prompt=a=b'"),
        ("prompt=a,", "''"),
    ],
)
def test_mappings_that_are_none_are_refused(columns, got):
    with pytest.raises(InputError) as caught:
        reader(columns)
    assert caught.value.place == "config.data.columns" and got in caught.value.got
