import dataclasses
import gzip
import importlib.util
import json
import os.path
from decimal import Decimal
from pathlib import Path

import pytest

from dpo_jax.data import formats
from dpo_jax.types import InputError, Pair, Row
from tests.support.tokenizers_made import BOS_AND_EOS, CHATML, THINKING, make_tokenizer

HH = Path(__file__).parents[2] / "shared/data/hh_harmless_train.jsonl.gz"
USER = {"role": "user", "content": "Is the sky blue?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


def render(fields, *, format="plain", template: str | None = CHATML):
    row = Row("prefs.jsonl:17", fields)
    (pair,) = formats.render(row, format=format, tokenizer=make_tokenizer(template=template))
    return pair


def failure(fields, **options):
    with pytest.raises(InputError) as caught:
        render(fields, **options)
    assert caught.value.place == "prefs.jsonl:17"
    assert caught.value.expected and caught.value.remedy
    return caught.value


def transcripts(shared, chosen, rejected):
    return {"chosen": shared + chosen, "rejected": shared + rejected}


# Formats


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "plain"),
        ({"prompt": "a", "chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "plain"),
        ({"prompt": None, **transcripts("\n\nHuman: a\n\nAssistant:", " b", " c")}, "hh"),
        (CHAT, "chat"),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, "chat"),
        ({"prompt": USER["content"], "chosen": [USER, YES], "rejected": [USER, NO]}, "chat"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "ranked"),
        ({"prompt": [USER], "responses": [[YES], [NO]], "ranks": [1, 2], "chosen": None}, "ranked"),
        ({"prompt": "a", "completion": "b", "label": False}, "unpaired"),
        ({"prompt": [USER], "completion": [YES], "label": True, "rejected": None}, "unpaired"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "responses": ["b", "c"], "completion": "b"}, "plain"),
    ],
)
def test_detect_knows_each_format(fields, format):
    assert formats.detect(Row("a:1", fields)) == format


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"chosen": "b", "rejected": "\n\nAssistant: c"}, "answers as text, and no column 'prompt'"),
        ({"prompt": "a", "chosen": "b"}, "no 'rejected'"),
        ({"prompt": "a", "label": True}, "no 'chosen'"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "'chosen' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is a number"),
        ({"prompt": "a", "chosen": "b", "rejected": {"text": "c"}}, "'rejected' is an object with the keys 'text'"),
    ],
)
def test_detect_says_what_it_cannot_tell(fields, got):
    with pytest.raises(InputError) as caught:
        formats.detect(Row("a:1", fields))
    assert got in caught.value.got


def test_render_refuses_unknown_formats_and_lists_the_known():
    with pytest.raises(
        InputError, match="config.data.format: 'sharegpt'; expected one of plain, chat, hh, ranked, unpaired"
    ):
        render(CHAT, format="sharegpt")


# Plain text and what holds for every format


def test_render_takes_plain_text_as_it_stands_and_ignores_other_columns():
    pair = render({"prompt": " a\n", "chosen": "b ", "rejected": "\nc", "score": 3})
    assert pair == Pair("prefs.jsonl:17", " a\n", "b ", "\nc")


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_render_names_the_missing_column(name):
    fields = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert f"no {name!r}" in failure({k: v for k, v in fields.items() if k != name}).got
    assert failure({**fields, name: None}).got == f"{name!r} is null"
    assert failure({**fields, name: 1}).got == f"{name!r} is a number"


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "a ranking"),
        ({"prompt": "a", "completion": "b", "label": True}, "an unpaired example"),
    ],
)
def test_render_says_of_what_form_a_row_is_that_was_to_be_a_pair(fields, form):
    error = failure(fields, format="chat")
    assert error.got.endswith(f": the row is {form}") and "--config.data.format=auto" in error.remedy


@pytest.mark.parametrize("empty", ["", " \n\t"])
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_render_refuses_empty_answers(name, empty):
    said = f"{name!r} is empty"
    assert failure({"prompt": "a", "chosen": "b", "rejected": "c", name: empty}).got == said
    assert failure({**CHAT, name: [{"role": "assistant", "content": empty}]}, format="chat").got == said
    assert failure({**CHAT, name: []}, format="chat").got == said
    fields = transcripts("\n\nHuman: a\n\nAssistant:", " b", " c")
    fields[name] = fields[name][:-2] + empty
    assert failure(fields, format="hh").got == said


def test_render_refuses_equal_answers():
    assert "equal" in failure({"prompt": "a", "chosen": "b", "rejected": "b"}).got
    assert "equal" in failure({**CHAT, "rejected": [YES]}, format="chat").got
    assert "equal" in failure({"chosen": [USER, YES], "rejected": [USER, YES]}, format="chat").got
    # Different messages that the template writes alike.
    assert "equal" in failure({**CHAT, "rejected": [{**YES, "name": "Bob"}]}, format="chat").got


def test_render_refuses_half_characters():
    assert "\\ud83d" in failure({"prompt": "a", "chosen": "b \ud83d", "rejected": "c"}).got


def test_render_passes_reference_log_probabilities_on():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert render({**plain, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}).reference == (-1.5, -2.0)
    assert render({**plain, "ref_chosen_logps": None, "ref_rejected_logps": None}).reference is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "got"),
    [
        (-1.0, None, "no 'ref_rejected_logps'"),
        (None, -1.0, "no 'ref_chosen_logps'"),
        (-1.0, float("nan"), "'ref_rejected_logps' is nan"),
        (float("-inf"), -1.0, "'ref_chosen_logps' is -inf"),
        ("x", -1.0, "'ref_chosen_logps' is 'x'"),
        (-1.0, True, "'ref_rejected_logps' is true"),
    ],
)
def test_render_refuses_half_a_reference_and_what_is_no_number(chosen, rejected, got):
    fields = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert got in failure({**fields, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}).got


@pytest.mark.parametrize(
    ("given", "weight", "margin"),
    [
        ({}, 1.0, 0.0),
        ({"weight": None, "margin": ""}, 1.0, 0.0),
        ({"weight": 2, "margin": 0.25}, 2.0, 0.25),
        ({"weight": "0.5", "margin": "-1e-1"}, 0.5, -0.1),  # CSV has only text; a margin may be below 0
        ({"weight": 0}, 0.0, 0.0),
        ({"weight": Decimal("1.5"), "margin": Decimal("0")}, 1.5, 0.0),
    ],
)
def test_render_reads_weights_and_margins(given, weight, margin):
    pair = render({"prompt": "a", "chosen": "b", "rejected": "c"} | given)
    assert (pair.weight, pair.margin) == (weight, margin)
    talk = render(CHAT | given, format="chat")
    assert (talk.weight, talk.margin) == (weight, margin)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"weight": -1}, "'weight' is -1"),
        ({"weight": float("nan")}, "'weight' is nan"),
        ({"weight": "high"}, "'weight' is 'high'"),
        ({"weight": 1e39}, "'weight' is 1e+39"),  # infinite in float32
        ({"weight": [1, 2]}, "'weight' is [1, 2]"),
        ({"margin": float("inf")}, "'margin' is inf"),
        ({"margin": True}, "'margin' is true"),
    ],
)
def test_render_refuses_weights_and_margins_that_are_no_such_numbers(given, got):
    assert failure({"prompt": "a", "chosen": "b", "rejected": "c"} | given).got == got


def test_weight_of_a_ranking_is_that_of_each_pair_and_a_margin_needs_a_pair():
    ranking = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 3], "weight": 3}
    row = Row("prefs.jsonl:17", ranking)
    pairs = formats.render(row, format="ranked", tokenizer=make_tokenizer(template=CHATML))
    assert [pair.weight for pair in pairs] == [3, 3, 3]
    single = {"prompt": "a", "completion": "b", "label": True, "weight": "3"}
    assert render(single, format="unpaired").weight == 3
    for fields, format, what in ((ranking, "ranked", "a ranking"), (single, "unpaired", "one completion")):
        assert failure(fields | {"margin": 1}, format=format).got == f"'margin' beside {what}"


# HH transcripts


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (" yes", " no"),
        (" I think so", " I thought so"),  # the common characters run into the answers, and end inside a word
        (" yes\n\nHuman: why?\n\nAssistant: so", " no\n\nHuman: why?\n\nAssistant: so"),
        (" yes", " yes, well\n\nHuman: why?\n\nAssistant: so"),  # one answer runs on with a turn of its own
    ],
)
def test_render_splits_transcripts_at_the_header_and_never_inside_an_answer(chosen, rejected):
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = render(transcripts(prompt, chosen, rejected), format="hh")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.templated) == (prompt, chosen, rejected, False)


def test_render_splits_transcripts_at_the_last_header_both_share():
    shared = "\n\nHuman: a\n\nAssistant: yes\n\nHuman: c\n\nAssistant:"
    assert render(transcripts(shared, " b", " bc"), format="hh").prompt == shared


def test_render_refuses_transcripts_that_share_no_header():
    fields = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}
    assert "that both texts share" in failure(fields, format="hh").got
    assert "a column 'prompt', and config.data.format is 'hh'" in failure({**fields, "prompt": "a"}, format="hh").got


@pytest.mark.skipif(not HH.exists(), reason="needs ../shared/data/hh_harmless_train.jsonl.gz")
def test_render_splits_every_real_transcript_at_a_header():
    with gzip.open(HH, "rt") as file:
        rows = [json.loads(line) for line in file]
    inside = 0
    for fields in rows:
        try:
            pair = render(fields, format="hh", template=None)
        except InputError as error:
            assert error.got == "'chosen' is empty"
            continue
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (fields["chosen"], fields["rejected"])
        inside += len(os.path.commonprefix([pair.chosen, pair.rejected]).strip()) > 0
    assert len(rows) == 1435 and inside > 100  # so the common characters do run into answers here


# Chat


def test_render_writes_chat_with_the_header_in_the_prompt_and_the_end_of_turn_in_the_answer():
    expected = Pair(
        "prefs.jsonl:17",
        "<|im_start|>user\nIs the sky blue?<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
        templated=True,
    )
    assert render(CHAT, format="chat") == expected
    assert render({"chosen": [USER, YES], "rejected": [USER, NO]}, format="chat") == expected
    assert render({**CHAT, "prompt": USER["content"]}, format="chat") == expected
    both = {"prompt": USER["content"], "chosen": [USER, YES], "rejected": [USER, NO]}
    assert render(both, format="chat") == expected
    assert render({**both, "prompt": [USER]}, format="chat") == expected


def test_errors_about_roles_in_columns_of_text_name_the_format_that_reads_it():
    fields = {"prompt": "q", "chosen": json.dumps([USER]), "rejected": json.dumps([YES])}
    assert "--config.data.format=plain" in failure(fields, format="chat").remedy


def test_prompts_may_hold_what_was_not_trained_on():
    assert render({**CHAT, "prompt": [USER, {**NO, "weight": 0}, USER]}, format="chat").chosen == "yes<|im_end|>\n"


def test_render_splits_implicit_chat_at_the_last_common_message():
    follow = {"role": "user", "content": "Why?"}
    shared = [USER, YES, follow]
    pair = render({"chosen": [*shared, YES, follow, NO], "rejected": [*shared, NO]}, format="chat")
    assert pair.prompt.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    assert pair.chosen.startswith("yes<|im_end|>\n<|im_start|>user\nWhy?") and pair.rejected == "no<|im_end|>\n"


def test_render_ignores_keys_that_arrow_filled_with_null():
    nulls = {"chosen": [{**USER, "tool_calls": None}, YES], "rejected": [USER, {**NO, "tool_calls": None}]}
    strict = CHATML.replace("{% for", "{% if messages[0].tool_calls is defined %}{{ 1 / 0 }}{% endif %}{% for", 1)
    assert render(nulls, format="chat", template=strict) == render(CHAT, format="chat")


def test_render_continues_an_assistant_message_that_ends_the_prompt():
    start = {"role": "assistant", "content": "I say "}
    pair = render({**CHAT, "prompt": [USER, start]}, format="chat")
    assert pair.prompt.endswith("<|im_start|>assistant\nI say ")
    assert (pair.chosen, pair.rejected) == ("yes<|im_end|>\n", "no<|im_end|>\n")


def test_render_keeps_what_a_template_writes_at_the_ends():
    pair = render(CHAT, format="chat", template=BOS_AND_EOS)
    assert (pair.prompt, pair.chosen) == ("<bos>[Is the sky blue?]", " yes<eos>")


def test_render_ends_the_prompt_where_header_and_finished_turn_part():
    # "<" begins both answers and what the header alone has: it is not what they share.
    fields = {**CHAT, "chosen": [{**YES, "content": "<b>yes"}], "rejected": [{**NO, "content": "<i>no"}]}
    pair = render(fields, format="chat", template=THINKING)
    assert pair.prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    assert (pair.chosen, pair.rejected) == ("<b>yes<|im_end|>\n", "<i>no<|im_end|>\n")


def test_render_reads_text_as_messages_if_the_format_is_chat():
    expected = render(CHAT, format="chat")
    assert render({"prompt": USER["content"], "chosen": "yes", "rejected": "no"}, format="chat") == expected
    asked = f"\n\nHuman: {USER['content']}\n\nAssistant:"
    assert render(transcripts(asked, " yes", " no"), format="chat") == expected
    assert render({"prompt": asked, "chosen": " yes", "rejected": " no"}, format="chat") == expected


@pytest.mark.parametrize("begin", ["", "\n\n", " "])
def test_render_reads_transcripts_whose_first_header_lacks_its_blank_lines(begin):
    asked = f"{begin}Human: {USER['content']}\n\nAssistant:"
    expected = render(CHAT, format="chat")
    assert render(transcripts(asked, " yes", " no"), format="chat") == expected
    assert render({"prompt": asked, "chosen": " yes", "rejected": " no"}, format="chat") == expected


def test_render_refuses_transcripts_with_text_before_the_first_header():
    fields = transcripts("System: Be terse.\n\nHuman: a\n\nAssistant:", " b", " c")
    assert "the text 'System: Be terse.' before its first header" in failure(fields, format="chat").got
    assert render(fields, format="hh").prompt.startswith("System: Be terse.")


def test_render_compares_calls_without_their_ids():
    def asked(id):
        call = {"id": id, "type": "function", "function": {"name": "look", "arguments": {}}}
        return [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": id, "content": "blue"},
        ]

    pair = render({"chosen": [*asked("1"), YES], "rejected": [*asked("2"), NO]}, format="chat")
    assert (pair.chosen, pair.rejected) == ("yes<|im_end|>\n", "no<|im_end|>\n")


def test_render_compares_messages_by_what_templates_write():
    expected = render(CHAT, format="chat")
    for numbered in ({"id": 1}, {"weight": 0.5, "token_count": 3}):
        for fields in ({}, CHAT):
            fields = fields | {"chosen": [USER | numbered, YES], "rejected": [USER, NO]}
            assert dataclasses.replace(render(fields, format="chat"), unread=()) == expected
    assert "equal" in failure({**CHAT, "rejected": [{**YES, "id": 2}]}, format="chat").got


def test_render_joins_parts_of_text():
    parts = [{"type": "text", "text": "Is the "}, {"type": "text", "text": "sky blue?", "image": None}]
    assert render({**CHAT, "prompt": [{**USER, "content": parts}]}, format="chat") == render(CHAT, format="chat")


WITH_CALLS = CHATML.replace("m.content", "m.content + (m.tool_calls | tojson if m.tool_calls else '')")


@pytest.mark.parametrize(
    "call",
    [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}],
        },
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": null}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": null}}'},
        {"role": "tool_call", "content": '[{"name": "f", "arguments": {"a": null}}]'},
        {"role": "tool_call", "content": [{"name": "f", "arguments": {"a": None}}]},
        {"role": "tool_call", "content": [{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}]},
    ],
)
def test_render_decodes_the_arguments_of_calls_once(call):
    written = '[{"type": "function", "function": {"name": "f", "arguments": {"a": null}}}]<|im_end|>\n'
    assert render({**CHAT, "chosen": [call]}, format="chat", template=WITH_CALLS).chosen == written


@pytest.mark.parametrize("result", [{"ü": None}, [{"a": 1}], [], 3, False])
def test_render_writes_results_of_tools_as_json(result):
    fields = {**CHAT, "prompt": [USER, {"role": "tool", "content": result}]}
    assert f"tool\n{json.dumps(result, ensure_ascii=False)}<|im_end|>" in render(fields, format="chat").prompt


@pytest.mark.parametrize("text", ["a=1", "[1]", '{"a": 1'])
def test_render_refuses_arguments_that_are_no_object(text):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    assert failure({**CHAT, "chosen": [call]}, format="chat").got.startswith("message 1 of 'chosen' calls 'f' with")


@pytest.mark.parametrize("role", ["human", "Human", "User"])
def test_render_takes_the_names_that_roles_have_elsewhere(role):
    assert render({**CHAT, "prompt": [{**USER, "role": role}]}, format="chat") == render(CHAT, format="chat")


@pytest.mark.parametrize(
    "printed",
    [
        str([USER, YES]),
        "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]",
        "array([{'content': 'a', 'role': 'user'}], dtype=object)",
        '[{"role": "user", "content": "cut',
    ],
)
def test_printed_messages_are_refused(printed):
    fields = {"prompt": "a", "chosen": printed, "rejected": "b"}
    for format in ("plain", "chat"):
        error = failure(fields, format=format)
        assert error.got.startswith("'chosen' is text that holds") and "json.dumps" in error.expected
    with pytest.raises(InputError, match="'chosen' is text that holds"):
        formats.detect(Row("a:1", {"chosen": printed, "rejected": printed + " "}))


@pytest.mark.parametrize("answer", [json.dumps(YES), '{"from": "a", "to": "b"}'])
def test_text_that_is_json_of_one_message_beside_other_text_stays_text(answer):
    fields = {"prompt": "q", "chosen": answer, "rejected": "no"}
    assert formats.detect(Row("a:1", fields)) == "plain" and render(fields).chosen == answer
    assert render(fields, format="chat").chosen == f"{answer}<|im_end|>\n"
    row = Row("a:1", {"prompt": json.dumps(USER), "chosen": json.dumps(YES), "rejected": json.dumps(NO)})
    assert formats.detect(row) == "chat"
    assert formats.detect(Row("a:1", fields | {"chosen": json.dumps([YES])})) == "chat"


def test_text_that_only_looks_like_a_list_stays_text():
    for text in ('[{"name": "a"}]', "[{'name': 'a'}]", "[1]", "{'a': 1}", '{"role": "x", '):
        assert render({"prompt": "a", "chosen": text, "rejected": "b"}).chosen == text


def test_header_left_out_is_what_only_the_generation_header_has():
    row = Row("a:1", CHAT)
    left_out = [
        formats.header_left_out(row, format="chat", tokenizer=make_tokenizer(template=template))
        for template in (CHATML, THINKING, BOS_AND_EOS)
    ]
    assert left_out == ["", "<think>\n", ""]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_end|>' }}"),  # another header
        CHATML.replace("m.content", "(m.content if loop.last else '...')"),  # earlier messages rewritten
        CHATML.replace("{% for", "{{ messages | length }}{% for", 1),
    ],
)
def test_render_refuses_templates_that_write_the_prompt_in_another_way_before_an_answer(template):
    assert "differently when an answer follows" in failure(CHAT, format="chat", template=template).got


def test_render_passes_tools_and_options_to_the_template():
    template = "{{ tools | tojson if tools is not none else 'none' }} {{ style }} " + CHATML
    tools = [{"type": "function", "function": {"name": "look"}}]
    for given in (tools, json.dumps(tools)):
        fields = {**CHAT, "tools": given, "chat_template_kwargs": {"style": "terse", "date": None}}
        prompt = render(
            fields, format="chat", template=template + "{% if date is defined %}{{ 1 / 0 }}{% endif %}"
        ).prompt
        assert prompt.startswith('[{"type": "function", "function": {"name": "look"}}] terse <|im_start|>')
    assert render({**CHAT, "tools": []}, format="chat", template=template).prompt.startswith("none  <|im_start|>")


def test_render_takes_tool_calls_without_text_as_answers():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    template = CHATML.replace("m.content", "m.content + (m.tool_calls | tojson if m.tool_calls else '')")
    assert "look" in render({**CHAT, "chosen": [call]}, format="chat", template=template).chosen


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"chosen": [{"role": "assistant", "content": 3}]}, "message 1 of 'chosen' has a 'content' that is a number"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}]},
            "part of type 'image'",
        ),
        ({"prompt": [{**USER, "images": ["x.png"]}]}, "message 1 of 'prompt' has 'images'"),
        ({"chosen": [{**YES, "weight": 0}]}, "'chosen' has a message of the assistant with 'weight' 0"),
        ({"rejected": [{**NO, "loss": False}]}, "message of the assistant with 'loss' False"),
        ({"chosen": [{"from": "gpt", "text": "yes"}]}, "message 1 of 'chosen' has no 'content', but a 'text'"),
        ({"chosen": b"yes"}, "'chosen' is bytes (Parquet's binary"),
        ({"prompt": [USER, {"content": "a"}]}, "message 2 of 'prompt'"),
        ({"rejected": ["no"]}, "message 1 of 'rejected'"),
        ({"rejected": 3}, "'rejected' is a number"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": None}, "no prompt: 'chosen' and 'rejected' begin with different messages"),
        ({"chosen": [USER, YES], "prompt": None, "rejected": []}, "'rejected' is empty"),
        (
            {"prompt": "Another question", "chosen": [USER, YES], "rejected": [USER, NO]},
            "a text in 'prompt' that is none",
        ),
        ({"chosen": [USER, YES]}, "begins with a message of the role 'user'"),
        ({"chosen": [{"role": "assistant", "text": "yes"}]}, "message 1 of 'chosen' has no 'content'"),
        ({"chosen": [{"role": 3, "content": "yes"}]}, "message 1 of 'chosen' has a 'role' that is a number"),
        ({"system": 3}, "'system' is a number"),
        ({"tools": "[{"}, "'tools' is text that is no JSON"),
        ({"tools": {"a": 1}}, "'tools' is an object"),
        ({"chat_template_kwargs": ["terse"]}, "'chat_template_kwargs' is a list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' with 'tokenize'"),
    ],
)
def test_render_says_what_is_wrong_with_a_conversation(changes, got):
    assert got in failure({**CHAT, **changes}, format="chat").got


def test_render_says_that_there_is_no_template_or_that_it_refuses():
    assert "without a chat template" in failure(CHAT, format="chat", template=None).got
    refusing = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in failure(CHAT, format="chat", template=refusing).got


def public_templates():
    """Chat templates of well-known models, as they lie in an installed TRL."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    return sorted(folder.glob("*.jinja")) if folder else []


@pytest.mark.skipif(not public_templates(), reason="needs the templates in an installed trl")
def test_render_splits_under_every_public_template():
    turns = [USER, {"role": "assistant", "content": "Earlier."}, {"role": "user", "content": "Why?"}]
    failed = set()
    for path in public_templates():
        for prompt in ([USER], turns):
            try:
                pair = render({**CHAT, "prompt": prompt}, format="chat", template=path.read_text())
            except InputError:
                failed.add(path.stem)
                continue
            assert prompt[-1]["content"] in pair.prompt and "yes" not in pair.prompt, path.stem
            assert "yes" in pair.chosen and "no" in pair.rejected, path.stem
            assert prompt[-1]["content"] not in pair.chosen + pair.rejected, path.stem
    images = {"idefics3", "llava_next", "smolvlm"}  # they do not take text content
    assert {name.removesuffix("_training") for name in failed} <= images


def test_render_takes_reference_values_as_csv_has_them():
    fields = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert render(fields | {"ref_chosen_logps": "-1.5", "ref_rejected_logps": "-2"}, format="plain").reference == (
        -1.5,
        -2,
    )
    assert render(fields | {"ref_chosen_logps": "", "ref_rejected_logps": ""}, format="plain").reference is None
    for bad in ("x", "nan", "", 10**400, True):
        assert (
            "ref_rejected_logps"
            in failure(fields | {"ref_chosen_logps": -1, "ref_rejected_logps": bad}, format="plain").got
        )


def test_render_keeps_nulls_within_arguments_and_schemas_alone():
    template = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    arguments = {"city": "Rome", "date": None}
    call = {"role": "assistant", "name": None, "tool_calls": [{"id": None, "function": {"arguments": arguments}}]}
    schema = {"name": "look", "strict": None, "parameters": {"city": {"type": "string", "default": None}}}
    pair = render({**CHAT, "chosen": [call], "tools": [schema]}, format="chat", template=template)
    assert '"default": null' in pair.prompt and pair.prompt.count("null") == 1
    assert '"date": null' in pair.chosen and pair.chosen.count("null") == 1


# Rankings


RANKED = {"prompt": "a", "responses": ["w", "x", "y", "z"], "scores": [2, 5, 2, 9.5]}
RANKED_CHAT = {"prompt": [USER], "responses": [[NO], [YES]], "ranks": [2, 1]}


def ranked(fields, rankings="all", template: str | None = CHATML):
    row = Row("prefs.jsonl:17", fields)
    return formats.render(row, format="ranked", tokenizer=make_tokenizer(template=template), rankings=rankings)


def ranked_failure(fields, rankings="all"):
    with pytest.raises(InputError) as caught:
        ranked(fields, rankings)
    assert caught.value.place == "prefs.jsonl:17" and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("rankings", "expected"),
    [
        ("all", ["zx", "zw", "zy", "xw", "xy"]),  # w and y score the same
        ("best", ["zx", "zw", "zy"]),
    ],
)
def test_render_makes_pairs_of_a_ranking(rankings, expected):
    assert ranked(RANKED, rankings) == [Pair("prefs.jsonl:17", "a", *letters) for letters in expected]


def test_render_leaves_out_ties_with_the_best():
    assert [pair.answers for pair in ranked({**RANKED, "scores": [9, 1, 9, 9]}, "best")] == [("w", "x")]
    assert [pair.answers for pair in ranked({**RANKED, "scores": [9, 1, 9, 9]})] == [(better, "x") for better in "wyz"]


def test_render_keeps_a_ranking_whole_with_the_best_first():
    expected = [Pair("prefs.jsonl:17", "a", "z", "x", ("y", "w"))]
    assert ranked({**RANKED, "scores": [1, 5, 2, 9.5]}, "whole") == expected
    assert ranked({"prompt": "a", "responses": RANKED["responses"], "ranks": [4, 2, 3, 1]}, "whole") == expected
    assert expected[0].answers == ("z", "x", "y", "w")
    two = {"prompt": "a", "responses": ["w", "x"], "scores": [1, 2]}
    assert ranked(two, "whole") == ranked(two, "all") == [Pair("prefs.jsonl:17", "a", "x", "w")]


def test_render_writes_rankings_of_messages_as_it_writes_pairs():
    (pair,) = ranked(RANKED_CHAT)
    assert pair == render(CHAT, format="chat")
    assert ranked({**RANKED_CHAT, "responses": [NO, YES]}) == [pair]  # single messages
    assert ranked({**RANKED_CHAT, "responses": [[USER, NO], [USER, YES]]}) == [pair]  # that repeat the prompt
    maybe = {"role": "assistant", "content": "<b>maybe"}
    (whole,) = ranked({**RANKED_CHAT, "responses": [[NO], [maybe], [YES]], "ranks": [3, 2, 1]}, "whole", THINKING)
    assert whole.prompt.endswith("<|im_start|>assistant\n") and whole.templated
    assert whole.answers == ("yes<|im_end|>\n", "<b>maybe<|im_end|>\n", "no<|im_end|>\n")


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"responses": None}, "'responses' is null"),
        ({"responses": "w"}, "'responses' is text"),
        ({"responses": ["w"], "scores": [1]}, "'responses' holds one response"),
        ({"responses": ["w", "x", "y", 3]}, "response 4 is a number"),
        ({"responses": ["w", "x", "y", None]}, "response 4 is null"),
        ({"responses": ["w", "x", " ", "z"]}, "response 3 is empty"),
        ({"responses": ["w", "x", "y", "x"]}, "responses 2 and 4 are equal"),
        ({"responses": ["w", "x", "y", "\ud83d"]}, "half a character"),
        ({"prompt": None}, "'prompt' is null"),
        ({"scores": None}, "neither 'scores' nor 'ranks'"),
        ({"ranks": [1, 2, 3, 4]}, "both 'scores' and 'ranks'"),
        ({"scores": 3}, "a number as 'scores' for 4 responses"),
        ({"scores": [1, 2, 3]}, "3 scores for 4 responses"),
        ({"scores": [1, 2, 3, None]}, "null in 'scores'"),
        ({"scores": [1, 2, 3, float("nan")]}, "nan in 'scores'"),
        ({"scores": [1, 2, 3, float("inf")]}, "inf in 'scores'"),
        ({"scores": [1, 2, 3, True]}, "true in 'scores'"),
        ({"scores": [2, 2, 2, 2]}, "all scores are equal"),
        ({"scores": None, "ranks": [3, 3, 3, 3]}, "all ranks are equal"),
        ({"scores": None, "ranks": [0, 1, 2, 3]}, "ranks 0, 1, 2, 3"),
        ({"scores": None, "ranks": [1, 2, 2.5, 3]}, "ranks 1, 2, 2.5, 3"),
        ({"ref_chosen_logps": -1.0}, "'ref_chosen_logps' beside a ranking"),
        ({"ref_rejected_logps": "-1"}, "'ref_rejected_logps' beside a ranking"),
    ],
)
@pytest.mark.parametrize("rankings", ["all", "best"])
def test_render_says_what_is_wrong_with_a_ranking(rankings, changes, got):
    assert got in ranked_failure({**RANKED, **changes}, rankings).got


def test_render_needs_a_defined_order_for_whole_rankings_only():
    error = ranked_failure(RANKED, "whole")
    assert "responses 1 and 3 have equal scores" in error.got and "different scores" in error.expected
    assert "have equal ranks" in ranked_failure({**RANKED, "scores": None, "ranks": [1, 2, 2, 3]}, "whole").got


def test_render_lets_empty_reference_columns_stand_beside_a_ranking():
    assert len(ranked({**RANKED, "ref_chosen_logps": "", "ref_rejected_logps": None})) == 5


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"responses": [[NO], 3]}, "response 2 is a number"),
        ({"responses": [[NO], [{"role": "assistant"}]]}, "message 1 of response 2 has no 'content'"),
        ({"responses": [[NO], [NO]]}, "the answers are equal"),
        ({"responses": [[NO], [YES], [NO]], "ranks": [1, 2, 3]}, "responses 1 and 3 are equal"),
        ({"responses": [[NO], [USER, YES]]}, "the answer in response 2 begins with a message of the role 'user'"),
        ({"responses": [[], [YES]]}, "response 1 is empty"),
        ({"prompt": []}, "'prompt' is empty"),
    ],
)
def test_render_says_what_is_wrong_with_a_ranking_of_messages(changes, got):
    assert got in ranked_failure({**RANKED_CHAT, **changes}).got


# Unpaired examples


UNPAIRED = {"prompt": "a", "completion": "b", "label": True}


def test_render_puts_a_completion_on_the_side_of_its_label():
    assert render(UNPAIRED, format="unpaired") == Pair("prefs.jsonl:17", "a", "b", "")
    assert render({**UNPAIRED, "label": False}, format="unpaired") == Pair("prefs.jsonl:17", "a", "", "b")


@pytest.mark.parametrize("side, values", [(0, [True, 1, 1.0, "true", "True", "1"]), (1, [False, 0, 0.0, "false", "0"])])
def test_render_reads_labels_as_files_have_them(side, values):
    for value in values:
        assert render({**UNPAIRED, "label": value}, format="unpaired").answers[side] == "b", value


def test_render_writes_completions_of_messages_as_it_writes_pairs():
    pair = render(CHAT, format="chat")
    for completion in ([YES], YES, [USER, YES]):
        found = render({"prompt": [USER], "completion": completion, "label": True}, format="unpaired")
        assert found == Pair(pair.place, pair.prompt, pair.chosen, "", templated=True)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"label": None}, "'label' is null"),
        ({"label": "good"}, "'label' is 'good'"),
        ({"label": ""}, "'label' is ''"),
        ({"label": 2}, "'label' is 2"),
        ({"label": 0.5}, "'label' is 0.5"),
        ({"completion": None}, "'completion' is null"),
        ({"completion": " "}, "'completion' is empty"),
        ({"completion": 3}, "'completion' is a number"),
        ({"completion": "\ud83d"}, "half a character"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": [USER], "completion": 3}, "'completion' is a number"),
        (
            {"prompt": [USER], "completion": [{"role": "user", "content": "b"}]},
            "the answer in 'completion' begins with",
        ),
        ({"prompt": [USER], "completion": []}, "'completion' is empty"),
        ({"ref_rejected_logps": -1.0}, "'ref_rejected_logps' beside one completion"),
    ],
)
def test_render_says_what_is_wrong_with_an_unpaired_example(changes, got):
    assert got in failure({**UNPAIRED, **changes}, format="unpaired").got


def test_header_left_out_is_that_of_rankings_and_completions_too():
    tokenizer = make_tokenizer(template=THINKING)
    rows = {
        "ranked": RANKED_CHAT,
        "unpaired": {"prompt": [USER], "completion": [YES], "label": False},
        "plain": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    found = {
        name: formats.header_left_out(Row("a:1", row), format=name, tokenizer=tokenizer) for name, row in rows.items()
    }
    assert found == {"ranked": "<think>\n", "unpaired": "<think>\n", "plain": ""}


@pytest.mark.parametrize(
    ("format", "rankings", "kind"),
    [
        ("plain", "whole", "paired"),
        ("ranked", "all", "paired"),
        ("ranked", "best", "paired"),
        ("ranked", "whole", "ranked"),
        ("unpaired", "all", "unpaired"),
    ],
)
def test_kind_is_what_rows_become(format, rankings, kind):
    assert formats.kind_of(format, rankings) == kind
