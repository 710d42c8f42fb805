"""Every chat template that an installed package ships, with conversations of every kind: nothing is lost in silence."""

import collections
import importlib.util
import itertools
from pathlib import Path

import pytest

from dpo_jax.data import chat, formats, tokenize
from dpo_jax.types import InputError, Row
from tests.support.tokenizers_made import BOS_AND_EOS, CHATML, THINKING, make_tokenizer

RULES = tokenize.TokenizationRules(vocab_size=10**6, max_length=10**6, max_prompt_length=10**5, truncate_prompt="error")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Tide of a port",
        "parameters": {"type": "object", "properties": {"port": {"type": "string", "description": "Its name"}}},
    },
}

# Written for this test: each loses something, or writes it at an odd place.
MADE = {
    "chatml": CHATML,
    "thinking": THINKING,
    "bos and eos": BOS_AND_EOS,
    "no system": CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    "last answer only": CHATML.replace("m.content +", "(m.content if loop.last or m.role != 'assistant' else '') +"),
    "after think": CHATML.replace("m.content +", "m.content.split('</think>')[-1] +"),
    "first line": CHATML.replace("m.content +", "m.content.split('\n')[0] +"),
    "twenty characters": CHATML.replace("m.content +", "m.content[:20] +"),
    "trimmed": CHATML.replace("m.content +", "m.content | trim +"),
    "no role": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "marked": CHATML.replace("{{ '<|im_start|>'", "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>'", 1)
    .replace("{% endfor %}", "{% endif %}{% endfor %}", 1),
}  # fmt: skip


def shipped():
    """Chat templates of installed packages by name."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("missing")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def words():
    """Texts of three words, all different, so that each can be found in what a model reads."""
    counter = itertools.count()
    syllables = ["ba", "de", "ki", "lo", "mu", "na", "ri", "so", "ta", "ve"]

    def text():
        return " ".join("".join(syllables[int(d)] for d in f"{next(counter):04d}") for _ in range(3))

    return text


def conversations():
    """Rows by the kind of conversation they hold."""
    w = words()

    def m(role, content=None, **fields):
        return {"role": role, "content": w() if content is None else content, **fields}

    def call():
        function = {"name": "get_tide", "arguments": {"port": w(), "hours": 12, "rising": True}}
        return m("assistant", "", tool_calls=[{"id": "call00001", "type": "function", "function": function}])

    def result():
        return m("tool", f'{{"high": "{w()}"}}', name="get_tide", tool_call_id="call00001")

    def thought(inner=None):
        return f"<think>\n{inner or w()}\n</think>\n\n{w()}"

    user, tools = m("user"), {"tools": [TOOL]}
    turns = [m("user"), m("assistant"), m("user")]
    return {
        "one turn": {"prompt": [user], "chosen": [m("assistant")], "rejected": [m("assistant")]},
        "system": {"prompt": [m("system"), user], "chosen": [m("assistant")], "rejected": [m("assistant")]},
        "developer": {"prompt": [m("developer"), user], "chosen": [m("assistant")], "rejected": [m("assistant")]},
        "history": {"prompt": turns, "chosen": [m("assistant")], "rejected": [m("assistant")]},
        "late system": {
            "prompt": [user, m("assistant"), m("system"), m("user")],
            "chosen": [m("assistant")],
            "rejected": [m("assistant")],
        },
        "two questions": {"prompt": [user, m("user")], "chosen": [m("assistant")], "rejected": [m("assistant")]},
        "prefix": {
            "prompt": [user, m("assistant")],
            "chosen": [m("assistant", " " + w())],
            "rejected": [m("assistant")],
        },
        "turns": {
            "prompt": [m("system"), user],
            "chosen": [m("assistant"), m("user"), m("assistant")],
            "rejected": [m("assistant"), m("user"), m("assistant"), m("user"), m("assistant")],
        },
        "open turn": {"prompt": [user], "chosen": [m("assistant"), m("user")], "rejected": [m("assistant")]},
        "reasoning": {
            "prompt": [user],
            "chosen": [m("assistant", thought())],
            "rejected": [m("assistant", thought())],
        },
        "reasoning apart": {
            "prompt": [user],
            "chosen": [m("assistant", reasoning_content=w())],
            "rejected": [m("assistant", reasoning_content=w())],
        },
        "reasoning before": {
            "prompt": [user, m("assistant", thought()), m("user")],
            "chosen": [m("assistant")],
            "rejected": [m("assistant")],
        },
        "reasoning in turns": {
            "prompt": [user],
            "chosen": [m("assistant", thought()), m("user"), m("assistant", thought())],
            "rejected": [m("assistant", thought()), m("user"), m("assistant", thought())],
        },
        "call": {"prompt": [user], "chosen": [call()], "rejected": [m("assistant")], **tools},
        "call and words": {
            "prompt": [user],
            "chosen": [{**call(), "content": w()}],
            "rejected": [m("assistant")],
            **tools,
        },
        "call and result": {
            "prompt": [user],
            "chosen": [call(), result(), m("assistant")],
            "rejected": [call(), result(), m("assistant")],
            **tools,
        },
        "result before": {
            "prompt": [user, call(), result(), m("assistant"), m("user")],
            "chosen": [m("assistant")],
            "rejected": [m("assistant")],
            **tools,
        },
        "lines": {
            "prompt": [m("user", f"{w()}\n\n{w()}")],
            "chosen": [m("assistant", f"  {w()}\n{w()} ")],
            "rejected": [m("assistant", f'"{w()}" \\ {w()} ü')],
        },
        "long": {
            "prompt": [m("user", " ".join(w() for _ in range(20)))],
            "chosen": [m("assistant", " ".join(w() for _ in range(20)))],
            "rejected": [m("assistant")],
        },
        "options": {
            "prompt": [user],
            "chosen": [m("assistant")],
            "rejected": [m("assistant")],
            "chat_template_kwargs": {"unheard_of": True},
        },
    }


def texts_of(message):
    """Words that a message should bring: of its content, its reasoning, and its calls."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    values = [
        value for call in calls for value in (call["name"], *call["arguments"].values()) if isinstance(value, str)
    ]
    return " ".join([message["content"], message.get("reasoning_content", ""), *values]).replace('"', " ").split()


def model_reads(pair, outcome, tokenizer):
    """What stands in the token ids: the text of the prompt, of each answer, and of its scored tokens."""
    decode = tokenizer.backend_tokenizer.decode
    found = [decode(outcome.encoded.prompt.tolist(), skip_special_tokens=False)]
    for ids in outcome.encoded.answers:
        whole, scored = [i if i >= 0 else ~i for i in ids.tolist()], [i for i in ids.tolist() if i >= 0]
        found.append(tuple(decode(each, skip_special_tokens=False) for each in (whole, scored)))
    return found


def silent_losses(row, tokenizer):
    """What a row loses without being told, by an account of its own: every word of every message is looked for.

    Returns: the losses, and whether the row was told about or refused.
    """
    try:
        (pair,) = formats.render(row, format="chat", tokenizer=tokenizer)
        (outcome,) = tokenize.encode([pair], tokenizer, RULES)
    except InputError:
        return [], True
    if not isinstance(outcome, tokenize.Outcome):
        return [], True
    conversation, losses = chat.of_pair(row), []
    prompt, *answers = model_reads(pair, outcome, tokenizer)
    in_header = {"<think>"} if prompt.rstrip().endswith("<think>") else set()  # written before the model's turn
    for message in conversation.prompt:
        losses += [word for word in texts_of(message) if word not in prompt]
    for messages, (whole, scored) in zip(conversation.answers, answers, strict=True):
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, message in enumerate(messages):
            own = i in spoken
            for word in set(texts_of(message)) - in_header:
                mine = any(word in texts_of(messages[j]) for j in spoken)
                if own and word not in scored:
                    losses.append(f"not scored: {word}")
                if not own and not mine and len(word) > 4 and word in scored:
                    losses.append(f"scored: {word}")
                if not own and i < spoken[-1] and word not in whole:
                    losses.append(word)
    if "tools" in row.fields and "get_tide" not in prompt:
        losses.append("tools")
    if "chat_template_kwargs" in row.fields and "unheard_of" not in str(tokenizer.chat_template):
        losses.append("unheard_of")
    told = bool(pair.omissions or outcome.omissions)
    return ([] if told else losses), told


@pytest.mark.parametrize("kind", conversations())
def test_no_template_loses_text_in_silence(kind):
    row = Row("a:1", conversations()[kind])
    found, told = {}, collections.Counter()
    for name, template in {**MADE, **shipped()}.items():
        tokenizer = make_tokenizer(template=template)
        losses, refused = silent_losses(row, tokenizer)
        told[refused] += 1
        if losses:
            found[name] = losses
    assert not found
    if kind in ("one turn", "history", "long", "lines"):
        assert told[False] >= len(MADE) - 3  # most write these whole
    if kind == "options":
        assert not told[False]


CALL = "(m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson if m.tool_calls else '')"
CALLS = CHATML.replace("m.content +", f"m.content + {CALL} +")


@pytest.mark.parametrize(("template", "lost"), [(CALLS, set()), (CHATML, {"a tool call"})], ids=["written", "left out"])
def test_later_turns_that_repeat_a_call_are_not_taken_for_it(template, lost):
    """The answer has the call's words plain; the call, if it is written, has them escaped."""
    function = {"name": "get_tide", "arguments": {"port": 'the "old" port'}}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "High at noon."},
        {"role": "assistant", "content": 'At the "old" port it is high at noon.'},
    ]
    row = {"prompt": [{"role": "user", "content": "When?"}], "chosen": answer, "rejected": answer[:2] + [answer[0]]}
    (pair,) = formats.render(Row("a:1", row), format="chat", tokenizer=make_tokenizer(template=template))
    assert {omission.part for omission in pair.omissions} == lost
    assert not any("noon" in pair.chosen[a:b] for a, b in pair.scored[0][:1])
