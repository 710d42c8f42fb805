"""Output of `inspect` for sets that are not pairs."""

import dataclasses
import json

import numpy as np
import pytest

from dpo_jax.data import dataset, special_tokens, tokenize
from dpo_jax.reporting import data_summary
from dpo_jax.types import InputError
from tests.support.tokenizers_made import make_tokenizer

TOKENIZER = make_tokenizer()
RANKED = [
    {"prompt": "is ", "responses": ["b", "cd", "e"], "ranks": [2, 1, 3]},
    {"prompt": "is ", "responses": ["b", "c"], "ranks": [1, 2]},
]
UNPAIRED = [{"prompt": "is ", "completion": each, "label": each == "b"} for each in ("b", "cd")]


def load(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataset.load(
        str(path),
        split="train",
        reading=dataset.ReadingRules(format="auto", on_bad_row="error", rankings="whole"),
        tokenizer=TOKENIZER,
        tokenization=tokenize.TokenizationRules(1000, max_length=64, max_prompt_length=32, truncate_prompt="keep_end"),
        cache_dir=str(folder / "cache"),
    )


def test_example_names_the_answers_of_a_ranking_by_their_place(tmp_path):
    found = load(tmp_path, RANKED)
    first, second = (data_summary.example(found, TOKENIZER, i)[2:] for i in (0, 1))
    assert [line.split() for line in first] == [
        ["answer", "1", "(best),", "3", "tokens,", "scored:", "c|d|<eos>"],
        ["answer", "2,", "2", "tokens,", "scored:", "b|<eos>"],
        ["answer", "3,", "2", "tokens,", "scored:", "e|<eos>"],
    ]
    assert len(second) == 2


def test_lengths_count_answers_that_are_there(tmp_path):
    lines = data_summary.lengths(load(tmp_path, RANKED), "shared")
    titles = [line.partition(",")[0] for line in lines if not line.startswith(" ")]
    assert titles[1:4] == ["answer 1 (best) tokens: mean 2.5", "answer 2 tokens: mean 2.0", "answer 3 tokens: mean 2.0"]
    lines = data_summary.lengths(load(tmp_path, UNPAIRED), "shared")
    assert [line.partition(",")[0] for line in lines if line.startswith(("chosen", "rejected"))] == [
        "chosen tokens: mean 2.0",
        "rejected tokens: mean 3.0",
    ]


def test_summary_counts_weights_and_margins(tmp_path):
    rows = [{"prompt": "is ", "chosen": "b", "rejected": each, "weight": 2, "margin": 0.5} for each in ("c", "d")]
    found = load(tmp_path, [rows[0] | {"weight": "", "margin": 0}, *rows])
    lines = data_summary.truncated_and_dropped(found)
    assert "2 pairs have a weight other than 1; 1 to 2" in lines
    assert "2 pairs have a margin other than 0; 0 to 0.5" in lines
    alone = data_summary.truncated_and_dropped(found.without_rejected())
    assert "2 pairs have a margin, which is not read, as no answers are compared" in alone
    assert not [line for line in data_summary.truncated_and_dropped(load(tmp_path, UNPAIRED)) if "pairs have" in line]


def test_lengths_of_answers_that_nobody_reads_are_left_out(tmp_path):
    lines = data_summary.lengths(load(tmp_path, UNPAIRED).without_rejected(), "shared")
    assert not [line for line in lines if line.startswith("rejected")]


def test_errors_escape_what_terminals_act_on():
    error = InputError("a\x1b:1", got="\x07", expected="text\tof\nlines", remedy="\ud800")
    assert str(error) == "a\\x1b:1: \\x07; expected text\tof\nlines. \\ud800" and error.got == "\\x07"


def test_layouts_are_named(tmp_path):
    lines = data_summary.truncated_and_dropped(load(tmp_path, [{"question": "is ", "chosen": "b", "rejected": "c"}]))
    assert any(line.startswith("read as plain (question): ") for line in lines)


@pytest.mark.parametrize(("label", "side"), [(True, 1), (False, 2)])
def test_endless_answers_are_found_on_either_side(tmp_path, label, side):
    found = load(tmp_path, [row | {"label": label} for row in UNPAIRED])
    assert (np.asarray(found.lengths)[:, side] > 0).all()

    def lines(eos):
        return special_tokens.unended(
            "train", found, TOKENIZER, max_length=64, config={"eos_token_id": eos}, generation={}
        )

    assert lines(TOKENIZER.eos_token_id) == []
    tokens = np.where(np.asarray(found.tokens) == TOKENIZER.eos_token_id, 50, found.tokens)
    found = dataclasses.replace(found, tokens=tokens)
    assert "2 of 2 answers checked" in lines(TOKENIZER.eos_token_id)[0]


def test_turns_that_are_not_scored_have_lines_and_lengths_of_their_own(tmp_path):
    header = "\n\nHuman: is\n\nAssistant:"
    rows = [{"chosen": f"{header} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{header} e"}]
    found = load(tmp_path, rows)
    lines = [line.split(":", 1) for line in data_summary.example(found, TOKENIZER, 0)[2:]]
    states = ["chosen, 2 tokens, scored", "chosen, 12 tokens, not scored", "chosen, 3 tokens, scored"]
    assert [state for state, _ in lines] == [*states, "rejected, 3 tokens, scored"]
    assert [text.replace("|", "").strip() for _, text in lines] == [
        "b",
        "\\n\\nHuman: c\\n\\nAssistant:",
        "d<eos>",
        "e<eos>",
    ]
    lines = data_summary.lengths(found, "shared")
    titles = {line.partition(",")[0] for line in lines if line.startswith("chosen tokens:")}
    assert titles == {"chosen tokens: mean 17.0"}
    assert any(line.startswith("chosen tokens, scored: mean 5.0") for line in lines)
    assert "in 1 answer: 12 tokens that are not scored" in "\n".join(data_summary.truncated_and_dropped(found))
