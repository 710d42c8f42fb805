"""What of a conversation is scored, what a chat template leaves out, and where long prompts are shortened."""

import dataclasses
import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import formats, templates, tokenize
from dpo_jax.data.marks import is_scored, unmark
from dpo_jax.data.written import lost_characters
from dpo_jax.types import InputError, Row
from tests.support.tokenizers_made import CHATML, THINKING, make_tokenizer

RULES = tokenize.TokenizationRules(vocab_size=400, max_length=400, max_prompt_length=25, truncate_prompt="keep_end")
# Keeps only what follows the reasoning, as the template of the R1 distillations does.
FORGETFUL = CHATML.replace("m.content +", "(m.content or '').split('</think>')[-1] +")
# Marks what the model generates, the end of the turn included and the line break after it not.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes an empty thought into the last turn only, as Qwen3's does: earlier turns are no beginning of later text.
LAST_TURN = CHATML.replace(
    "'\n' + m.content", "'\n' + ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m.content"
)


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def said(*contents, first="assistant"):
    """Messages of assistant and user in turn."""
    roles = ("assistant", "user") if first == "assistant" else ("user", "assistant")
    return [message(roles[i % 2], content) for i, content in enumerate(contents)]


TURNS = {
    "prompt": said("is it blue?", first="user"),
    "chosen": said("yes it is", "sure?", "very sure"),
    "rejected": said("no"),
}


def render(fields, *, template: str | dict[str, str] = CHATML, **options):
    (pair,) = formats.render(Row("a:1", fields), format="chat", tokenizer=make_tokenizer(template=template), **options)
    return pair


def scored_texts(fields, *, template=CHATML, rules=RULES, **options):
    """Stretches of the chosen answer that are scored, decoded from its tokens, and the whole of the answer."""
    tokenizer = make_tokenizer(template=template)
    pair = render(fields, template=template, **options)
    (outcome,) = tokenize.encode([pair], tokenizer, rules)
    assert isinstance(outcome, tokenize.Outcome)
    ids, stretches = outcome.encoded.chosen, [""]
    for i, scored in zip(unmark(ids).tolist(), is_scored(ids).tolist(), strict=True):
        if scored:
            stretches[-1] += str(tokenizer.decode([i]))
        elif stretches[-1]:
            stretches.append("")
    return stretches, tokenizer.decode(unmark(ids).tolist())


# Scored turns

WHOLE = "yes it is<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nvery sure<|im_end|>\n"


@pytest.mark.parametrize(
    ("turns", "stretches"),
    [
        ("assistant", ["yes it is<|im_end|>\n", "very sure<|im_end|>\n"]),
        ("last", ["very sure<|im_end|>\n"]),
        ("all", [WHOLE]),
    ],
)
def test_scored_tokens_of_an_answer_are_those_of_the_turns_named(turns, stretches):
    assert scored_texts(TURNS, turns=turns) == (stretches, WHOLE)


@pytest.mark.parametrize(
    ("template", "stretches"),
    [
        (MARKED, ["yes it is<|im_end|>", "very sure<|im_end|>"]),
        (LAST_TURN, ["yes it is<|im_end|>\n", "<think>\n\n</think>\n\nvery sure<|im_end|>\n"]),
        (THINKING, ["yes it is<|im_end|>\n", "very sure<|im_end|>\n"]),
    ],
)
def test_scored_turns_are_found_in_templates_of_every_make(template, stretches):
    assert scored_texts(TURNS, template=template)[0] == stretches


def test_marks_of_a_template_hold_for_single_turns_too():
    single = TURNS | {"chosen": TURNS["chosen"][:1]}
    assert scored_texts(single, template=MARKED) == (["yes it is<|im_end|>"], "yes it is<|im_end|>")
    assert scored_texts(single, template=MARKED, turns="all")[0] == ["yes it is<|im_end|>\n"]


def test_answer_ends_with_its_last_scored_token():
    open_turn = TURNS | {"chosen": TURNS["chosen"][:2]}
    assert scored_texts(open_turn) == (["yes it is<|im_end|>\n"], "yes it is<|im_end|>\n")
    # Truncation inside the user's turn leaves the turn before.
    assert scored_texts(TURNS, rules=dataclasses.replace(RULES, max_length=28))[1] == "yes it is<|im_end|>\n"


def test_answer_without_a_scored_token_within_the_limit_is_a_bad_row():
    pair = render(TURNS, turns="last")
    prompt = len(make_tokenizer()(pair.prompt)["input_ids"])
    (outcome,) = tokenize.encode([pair], make_tokenizer(), dataclasses.replace(RULES, max_length=prompt + 12))
    assert isinstance(outcome, InputError) and "no scored token of 'chosen'" in outcome.got


def test_calls_are_scored_and_their_results_are_not():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}<call>"
        "{{ c.function | tojson }}</call>{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "tide", "arguments": {"port": "Hull"}}}
    chosen = [message("assistant", "", tool_calls=[call]), message("tool", "high"), message("assistant", "it is high")]
    stretches, _ = scored_texts(TURNS | {"chosen": chosen}, template=template)
    assert stretches == [
        '<call>{"name": "tide", "arguments": {"port": "Hull"}}</call><|im_end|>\n',
        "it is high<|im_end|>\n",
    ]


def test_template_that_joins_arguments_to_text_gets_them_as_json_text():
    arguments = "(m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.tool_calls else '')"
    call = {"function": {"name": "tide", "arguments": {"port": "Hüll"}}}
    fields = TURNS | {"chosen": [message("assistant", "", tool_calls=[call])]}
    pair = render(fields, template=CHATML.replace("m.content +", f"m.content + {arguments} +"))
    assert pair.chosen == 'tide{"port": "Hüll"}<|im_end|>\n' and not pair.omissions


def test_human_turns_in_a_transcript_are_not_scored():
    shared = "\n\nHuman: blue?\n\nAssistant:"
    fields = {"chosen": f"{shared} yes\n\nHuman: sure?\n\nAssistant: yes", "rejected": f"{shared} no"}
    for turns, expected in (("assistant", ((0, 4), (30, 34))), ("last", ((30, 34),)), ("all", None)):
        (pair,) = formats.render(Row("a:1", fields), format="hh", tokenizer=make_tokenizer(), turns=turns)
        assert pair.scored == (() if expected is None else (expected, ((0, 3),)))


def test_token_across_the_end_of_a_turn_is_split():
    # No special token stands between the turns: " is the" of both would be one piece of text.
    glued = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fields = {"prompt": said("Hum", first="user"), "chosen": said("an: is t", "he sk", "y, t"), "rejected": said("no")}
    stretches, whole = scored_texts(fields, template=glued)
    assert (stretches, whole) == (["an: is t", "y, t"], "an: is the sky, t")


# What is left out


def parts(pair):
    return {(omission.part, omission.answer, omission.text) for omission in pair.omissions}


def test_text_that_a_template_leaves_out_is_named():
    thought = TURNS | {"chosen": [message("assistant", "<think>\nhm\n</think>\n\nyes")]}
    assert parts(render(thought, template=FORGETFUL)) == {("reasoning", 0, "hm")}
    assert parts(render(thought)) == parts(render(TURNS)) == set()
    without_system = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
    system = TURNS | {"prompt": [message("system", "be brief"), *TURNS["prompt"]]}
    assert parts(render(system, template=without_system)) == {("a system message", -1, "be brief")}
    assert parts(render(system)) == set()
    apart = TURNS | {"rejected": [message("assistant", "no", reasoning_content="hm")]}
    assert parts(render(apart)) == {("reasoning", 1, "hm")}


def test_calls_and_tools_that_a_template_leaves_out_are_named():
    call = {"function": {"name": "tide", "arguments": {"port": "Hull"}}}
    fields = TURNS | {
        "chosen": [message("assistant", "one moment", tool_calls=[call])],
        "tools": [{"function": {"name": "tide", "parameters": {"properties": {"port": {}}}}}],
        "chat_template_kwargs": {"unread": 1},
    }
    assert parts(render(fields)) == {
        ("a tool call", 0, "tide"),
        ("a tool call", 0, "port"),
        ("a tool call", 0, "Hull"),
        ("a tool's schema", -1, "tide"),
        ("a tool's schema", -1, "port"),
        ("a value of chat_template_kwargs", -1, "unread"),
    }


@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_role_that_the_template_does_not_name_is_refused(side):
    fields = TURNS | {side: [*TURNS[side], message("asistant", "or green")]}
    with pytest.raises(InputError, match="role 'asistant', which .* Did you mean assistant"):
        render(fields)
    pair = render(fields, template=CHATML + "{# 'asistant' #}")
    assert "or green" in pair.prompt + pair.chosen


def test_reasoning_found_by_chance_in_the_content_is_named_and_the_content_is_not():
    fields = TURNS | {"rejected": [message("assistant", "12, I guess.", reasoning_content="I guess.")]}
    assert parts(render(fields)) == {("reasoning", 1, "I guess.")}


def test_a_call_that_is_left_out_is_named_once_though_parts_of_it_are_found_by_chance():
    call = {"function": {"name": "add", "arguments": {"n": 2}}}
    prompt = said("add 2?", "add n 2", "well?", first="user")
    answer = [message("assistant", "so", tool_calls=[call]), message("tool", "2 n"), message("assistant", "done")]
    assert {part for part, *_ in parts(render(TURNS | {"prompt": prompt, "chosen": answer}))} == {"a tool call"}


def test_keys_of_messages_that_neither_reader_nor_template_reads_are_named():
    answer = message(
        "assistant", "never", refusal="cannot", mood="glad", id="", tool_calls=None, reasoning="", weight=1
    )
    fields = TURNS | {"prompt": [message("user", "blue?", name="Ann")], "chosen": [answer]}
    assert render(fields).unread == ("mood", "name", "refusal")
    assert render(fields, template=CHATML + "{{ messages[-1]['mood'] }}").unread == ("name", "refusal")


def test_system_text_may_stand_in_a_later_turn_and_other_text_only_in_order():
    into_last = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ messages[0].content ~ '\n' if loop.index0 == 3 else '' }}"
        "{{ m.content }}]{% elif m.role == 'assistant' %} {{ m.content }}{% endif %}{% endfor %}"
    )
    prompt = [message("system", "be brief"), *said("blue?", "yes", "green?", first="user")]
    assert (
        parts(render(TURNS | {"prompt": prompt, "chosen": said("no")[:1], "rejected": said("yes")}, template=into_last))
        == set()
    )
    backwards = CHATML.replace("in messages", "in (messages[:-1] | reverse | list + messages[-1:])")
    prompt = said("blue?", "yes", "green?", first="user")
    fields = {"prompt": prompt, "chosen": said("it is"), "rejected": said("no")}
    with pytest.raises(InputError, match="differently when an answer"):
        render(fields, template=backwards)


def test_answers_that_differ_only_in_what_is_left_out_are_refused_with_the_reason():
    fields = TURNS | {
        side: [message("assistant", f"<think>\n{thought}\n</think>\n\nyes")]
        for side, thought in (("chosen", "short"), ("rejected", "much longer"))
    }
    with pytest.raises(templates.TemplateLoss, match="are equal once the chat template has left out 'short'"):
        render(fields, template=FORGETFUL)


def test_characters_without_a_token_are_named():
    assert lost_characters("a  b\n", "a b") == lost_characters("ﬁ", "fi") == ""
    assert lost_characters("a ü b", "a b") == "üb"
    assert lost_characters("ab", "a?b") == "b"
    (outcome,) = tokenize.encode([render(TURNS)], make_tokenizer(template=CHATML), RULES)
    assert isinstance(outcome, tokenize.Outcome) and outcome.omissions == ()


# Days


def test_template_writes_the_day_that_is_given():
    template = "{{ strftime_now('%d %b %Y') }}|" + CHATML + '{% if false %}{{ strftime_now("%Y") }}{% endif %}'
    assert render(TURNS, template=template, date="2024-02-29").prompt.startswith("29 Feb 2024|")
    assert templates.dated(template, "") == template and templates.writes_date(template)
    assert templates.dated(CHATML, "2024-02-29") == CHATML and not templates.writes_date(CHATML)


# Exchanges

LONG = [message("system", "s"), *said("a", "b", "c", "d", first="user"), message("user", "e"), message("user", "f")]


@pytest.mark.parametrize(("count", "left"), [(0, "sabcdef"), (1, "scdef"), (2, "sef")])
def test_oldest_exchanges_are_dropped_whole_and_the_system_stays(count, left):
    assert "".join(each["content"] for each in templates.drop_oldest(LONG, count)) == left
    assert templates.droppable(LONG) == 2


def test_prompt_that_is_one_exchange_drops_nothing():
    assert templates.droppable(said("a", first="user")) == templates.droppable(said("a")) == 0


# Faults that were found, each of a kind


def test_marks_hold_for_tokenizers_that_leave_whitespace_out_of_their_offsets():
    tokenizer = make_tokenizer(template=MARKED)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    trimming = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)))
    trimming.chat_template = MARKED
    code = TURNS | {"chosen": said("is  the\n    sky", "sure?", "\n  yes")}
    (pair,) = formats.render(Row("a:1", code), format="chat", tokenizer=trimming)
    (outcome,) = tokenize.encode([pair], trimming, RULES)
    assert isinstance(outcome, tokenize.Outcome)
    ids = outcome.encoded.chosen
    assert trimming.decode(ids[is_scored(ids)]) == "is  the\n    sky<|im_end|>\n  yes<|im_end|>"


def test_text_outside_of_the_marks_of_a_template_is_named():
    outside = MARKED.replace("{% generation %}", "{{ m.name or '' }}{{ m.content[:4] }}{% generation %}", 1)
    outside = outside.replace("{{ m.content + '<|im_end|>' }}", "{{ m.content[4:] + '<|im_end|>' }}", 1)
    assert ("text that is not scored", 0, "yes it is") in parts(render(TURNS, template=outside))
    assert parts(render(TURNS, template=MARKED)) == set()


def test_short_turn_is_not_taken_for_a_part_of_its_header():
    # An earlier turn is rewritten once others follow, so that its place is that of its words.
    fields = TURNS | {"chosen": said("yes", "sure?", "is", "well?", "no")}
    stretches, _ = scored_texts(fields, template=LAST_TURN)
    assert stretches == ["yes<|im_end|>\n", "is<|im_end|>\n", "<think>\n\n</think>\n\nno<|im_end|>\n"]


def test_reference_log_probs_do_not_outlive_a_dropped_exchange():
    prompt = said("blue? " * 9, "yes", "green?", first="user")
    fields = TURNS | {"prompt": prompt, "ref_chosen_logps": -5, "ref_rejected_logps": -6}
    pair = render(fields)
    limits = dataclasses.replace(RULES, max_length=40)
    (outcome,) = tokenize.encode([pair], make_tokenizer(), limits)
    assert isinstance(outcome, InputError) and "reference log-probs of a pair" in outcome.got
    (outcome,) = tokenize.encode([dataclasses.replace(pair, reference=None)], make_tokenizer(), limits)
    assert isinstance(outcome, tokenize.TooLong)


def test_every_form_of_reasoning_and_of_arguments_is_looked_for():
    reasoning = message("assistant", "no", reasoning_content="", reasoning="because", thinking="hm")
    found = parts(render(TURNS | {"rejected": [reasoning]}))
    assert found == {("reasoning", 1, "because"), ("reasoning", 1, "hm")}
    call = {"function": {"name": "sky", "parameters": {"port": "Hull"}}}
    found = parts(render(TURNS | {"rejected": [message("assistant", "no", tool_calls=[call])]}))
    assert ("a tool call", 1, "Hull") in found


def test_system_text_that_others_repeat_must_stand_there_once_more():
    without_system = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
    prompt = [message("system", "be brief"), message("user", "be brief: blue?")]
    assert parts(render(TURNS | {"prompt": prompt}, template=without_system)) == {("a system message", -1, "be brief")}
    assert parts(render(TURNS | {"prompt": prompt})) == set()


def test_settings_of_the_template_that_cannot_hold_are_refused():
    for kwargs, column in (({"tools": [{}]}, [{"name": "x"}]), ({"add_generation_prompt": True}, None)):
        with pytest.raises(InputError, match="'chat_template_kwargs' with"):
            render(TURNS | {"chat_template_kwargs": kwargs, "tools": column})
    (pair,) = formats.render(
        Row("a:1", TURNS | {"chat_template_kwargs": '{"m_is_read": 1}', "tools": ['{"name": "x"}']}),
        format="chat",
        tokenizer=make_tokenizer(template="{% if m_is_read %}{{ tools[0].name }}{% endif %}" + CHATML),
    )
    assert pair.prompt.startswith("x<|im_start|>") and not pair.omissions
    with pytest.raises(InputError, match="no chat template"):
        render(TURNS, template={"rag": CHATML})


def test_day_is_fixed_in_every_spelling_or_refused():
    for call in ("strftime_now('%d')", 'strftime_now ( "%d" )', "strftime_now(format='%d')"):
        assert templates.dated("{{ " + call + " }}", "2024-02-29") == '{{ "29" }}'
    with pytest.raises(InputError, match="asks for the day by strftime_now"):
        templates.dated("{% set f = '%d' %}{{ strftime_now(f) }}", "2024-02-29")
