import dataclasses
import datetime
import json
import re
import shutil
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dpo_jax.data import dataset, formats, keys, reading, sources, tokenize
from dpo_jax.data.notices import left_out
from dpo_jax.runtime import files
from dpo_jax.types import Encoded, InputError, Row
from tests.support.tokenizers_made import BOS_AND_EOS, CHATML, THINKING, make_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"
HH, NEOX = SHARED / "hh_harmless_train.jsonl.gz", SHARED / "gpt_neox_20b_tokenizer.json"
USER = {"role": "user", "content": "Is the sky blue?"}
LIMITS = tokenize.TokenizationRules(vocab_size=1000, max_length=64, max_prompt_length=32, truncate_prompt="keep_end")
READING = dataset.ReadingRules(format="auto", on_bad_row="error", rankings="all")


def plain(count, start=0) -> list[dict[str, Any]]:
    return [{"prompt": f"Is it {i}?", "chosen": f" yes, {i}", "rejected": " no"} for i in range(start, start + count)]


def chat(count):
    said = [[{"role": "assistant", "content": f"{word} {i}"} for i in range(count)] for word in ("yes", "no")]
    return [{"prompt": [USER], "chosen": [a], "rejected": [b]} for a, b in zip(*said, strict=True)]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(spec, cache, *, tokenizer=None, split="train", **options):
    """The pairs of a data specification, by READING and LIMITS but for the options that are named."""

    def changed(rules):
        names = {field.name for field in dataclasses.fields(rules)} & options.keys()
        return dataclasses.replace(rules, **{name: options.pop(name) for name in names})

    reading, limits = changed(READING), changed(LIMITS)
    assert not options
    tokenizer = tokenizer or make_tokenizer(template=CHATML)
    return dataset.load(
        spec, split=split, reading=reading, tokenizer=tokenizer, tokenization=limits, cache_dir=str(cache)
    )


def ids(pair):
    return [side.tolist() for side in (pair.prompt, *pair.answers)]


def contents(found):
    return [ids(pair) for pair in found]


def test_load_gives_the_pairs_of_every_source_in_order(tmp_path):
    rows = plain(3)
    rows[1] |= {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.parquet", chat(2))
    tokenizer = make_tokenizer(template=CHATML, adds="<bos> $A")
    found = load(f"{a},{b}*2.5", tmp_path / "cache", tokenizer=tokenizer)

    texts = [pair for row in rows for pair in formats.render(Row("", row), format="plain", tokenizer=tokenizer)]
    texts += [pair for row in chat(2) for pair in formats.render(Row("", row), format="chat", tokenizer=tokenizer)]
    outcomes = tokenize.encode(texts, tokenizer, LIMITS)
    expected = [outcome.encoded for outcome in outcomes if isinstance(outcome, tokenize.Outcome)]
    assert len(found) == 5 and contents(found) == [ids(pair) for pair in expected]
    assert found.lengths.tolist() == [pair.lengths for pair in expected]
    assert [tuple(key) for key in found.keys.tolist()] == [keys.content_key(pair) for pair in expected]
    np.testing.assert_array_equal(found.reference, [[np.nan] * 2, [-1.5, -2.5], *[[np.nan] * 2] * 3])
    assert found.source.tolist() == [0, 0, 0, 1, 1]
    assert (found.names, found.weights) == ((a, b), (1.0, 2.5))
    assert [found.place(i) for i in (1, 4)] == [f"{a}:2", f"{b}:2"]


def test_load_reports_what_it_read_cut_and_gave(tmp_path):
    rows = plain(3)
    rows[0] |= {"prompt": "0123456789" * 4, "chosen": "Z" * 40}
    rows[1] |= {"prompt": "is ", "chosen": "the", "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    path, talk = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", chat(2))
    found = load(f"{path},{talk}", tmp_path / "cache", tokenizer=make_tokenizer(template=THINKING))
    digests = [source.pop("digest") for source in found.report["sources"]]
    assert len(set(digests)) == 2
    assert found.kind == "paired"
    rest = {"weight": 1.0, "layouts": [], "unread": [], "unread_keys": []}
    assert found.report == {
        "rows": 5,
        "pairs": 5,
        "prompts_cut": 1,
        "prompt_tokens_cut": 8,
        "answers_cut": 1,
        "answer_tokens_cut": 9,
        "exchanges_cut": 0,
        "partly_scored": 0,
        "unscored_tokens": 0,
        "inner_ends": 0,
        "boundary_split": 1,
        "reference_given": 1,
        "weights_given": 0,
        "margins_given": 0,
        "dropped": [],
        "omitted": [],
        "sources": [
            {"name": path, "format": "plain", "rows": 3, "pairs": 3, "header_left_out": "", "templated": False} | rest,
            {"name": talk, "format": "chat", "rows": 2, "pairs": 2, "header_left_out": "<think>\n", "templated": True}
            | rest,
        ],
    }


def test_load_reads_columns_by_other_names_and_reports_those_that_nothing_reads(tmp_path):
    rows = [{"q": row["prompt"], "a": row["chosen"], "b": row["rejected"], "id": 0} for row in plain(3)]
    rows[2]["note"] = "x"  # the last row alone
    path, same = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", plain(3))
    found = load(f"{path},{same}", tmp_path, columns="prompt=q,chosen=a,rejected=b")
    assert contents(found) == contents(load(f"{same},{same}", tmp_path))
    assert [source["unread"] for source in found.report["sources"]] == [["id", "note"], []]
    rows = [{"q": {"text": row["prompt"], "n": {"a": row["chosen"], "m": 1}}, "b": row["rejected"]} for row in plain(3)]
    inner = load(write(tmp_path / "c.jsonl", rows), tmp_path, columns="prompt=q.text,chosen=q.n.a,rejected=b")
    assert inner.report["sources"][0]["unread"] == ["q"]  # because of m
    rows = [
        {"q": {"n": {"a": row["prompt"]}}, "chosen": row["chosen"], "rejected": row["rejected"]} for row in plain(3)
    ]
    assert (
        load(write(tmp_path / "d.jsonl", rows), tmp_path, columns="prompt=q.n.a").report["sources"][0]["unread"] == []
    )
    for columns, got in (
        ("prompt=w,chosen=a,rejected=b", "no column 'w' among 'q', 'a'"),
        ("weight=w", "no row has: 'w'"),
    ):
        with pytest.raises(InputError, match=got):
            load(path if "chosen" in columns else same, tmp_path, columns=columns)


def test_load_drops_rows_of_damaged_layouts_and_names_the_layout(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response_0": f"a{i}", "response_1": "b", "better_response_id": better}
        for i, better in enumerate([5, 0, 1, 7])
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = load(path, tmp_path, on_bad_row="skip")
    assert found.numbers.tolist() == [2, 3] and found.report["sources"][0]["layouts"] == ["PKU-SafeRLHF"]
    assert found.report["dropped"][0]["places"] == [f"{path}:1", f"{path}:4"]
    with pytest.raises(InputError, match=r"a\.jsonl:1: 'better_response_id' is 5; expected 0 or 1"):
        load(path, tmp_path)


# Bad rows


def with_bad_rows():
    rows = plain(9)
    rows[2]["chosen"] = " "
    rows[3] = {"chosen": "a", "rejected": "b"}
    rows[4] |= {"prompt": "0123456789" * 4, "chosen": "Z" * 40}
    rows[5] |= {"prompt": "0123456789" * 5, "chosen": "Z" * 40}
    rows[8]["rejected"] = rows[8]["chosen"]
    return rows


def test_load_skips_bad_rows_and_says_which_and_why(tmp_path):
    path = write(tmp_path / "a.jsonl", with_bad_rows())
    found = load(path, tmp_path / "cache", on_bad_row="skip", truncate_prompt="error")
    assert [found.place(i) for i in range(len(found))] == [f"{path}:{number}" for number in (1, 2, 7, 8)]
    assert contents(found) == contents(load(write(tmp_path / "b.jsonl", plain(2) + plain(2, 6)), tmp_path / "cache"))
    assert (found.report["rows"], found.report["pairs"]) == (9, 4)
    long = "a prompt of N tokens, in a pair longer than data.max_length N"
    dropped = {entry["reason"]: (entry["rows"], entry["places"]) for entry in found.report["dropped"]}
    assert dropped == {
        long: (2, [f"{path}:5", f"{path}:6"]),
        "'chosen' is empty": (1, [f"{path}:3"]),
        "no 'prompt' among the columns 'chosen', 'rejected'": (1, [f"{path}:4"]),
        "the answers are equal": (1, [f"{path}:9"]),
    }
    assert found.report["dropped"][0]["reason"] == long  # the commonest first


def test_load_raises_the_first_bad_row_of_the_file_whichever_step_finds_it(tmp_path):
    rows = with_bad_rows()
    for start, place in ((0, 3), (4, 5)):  # found in rendering, in encoding
        path = write(tmp_path / f"{start}.jsonl", plain(start) + rows[start:])
        with pytest.raises(InputError) as caught:
            load(path, tmp_path / "cache", truncate_prompt="error")
        assert caught.value.place == f"{path}:{place}"
    assert not any((tmp_path / "cache").iterdir())


def test_load_names_a_few_rows_and_a_few_reasons(tmp_path):
    rows = [{**plain(1)[0], "chosen": 1}] * 30 + [{f"column{chr(97 + i)}": 1} for i in range(25)] + plain(1)
    found = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", format="plain", on_bad_row="skip")
    dropped = found.report["dropped"]
    assert dropped[0]["rows"] == 30 and len(dropped[0]["places"]) == 5
    assert len(dropped) == 21 and dropped[1] == {**dropped[1], "reason": "other reasons", "rows": 6}
    assert sum(entry["rows"] for entry in dropped) == 55


def test_load_detects_the_format_by_the_first_row_that_has_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"chosen": 1}, *plain(2)])
    assert len(load(path, tmp_path / "cache", on_bad_row="skip")) == 2
    with pytest.raises(InputError, match=r"a\.jsonl:1: no 'rejected'"):
        load(path, tmp_path / "cache")
    mixed = write(tmp_path / "b.jsonl", plain(1) + chat(1))
    with pytest.raises(InputError, match=r"b\.jsonl:2: 'prompt' is a list; expected text"):
        load(mixed, tmp_path / "cache")


def test_load_refuses_data_without_a_usable_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**plain(1)[0], "chosen": ""}] * 2)
    with pytest.raises(InputError, match="no usable row among 2; most often: 'chosen' is empty"):
        load(path, tmp_path / "cache", on_bad_row="skip")
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(("option", "value"), [("format", "sharegpt"), ("on_bad_row", "drop"), ("rankings", "first")])
def test_load_refuses_unknown_choices_before_it_reads(tmp_path, option, value):
    with pytest.raises(InputError, match=f"data.{option}: got '{value}'; expected one of"):
        load("none.jsonl", tmp_path, **{option: value})


def test_load_stops_at_a_broken_line_even_if_rows_may_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(plain(1)[0]) + "\n{\n")
    with pytest.raises(InputError, match=r"a\.jsonl:2: broken JSON"):
        load(str(path), tmp_path / "cache", on_bad_row="skip")


# Rankings and unpaired examples


def test_load_keeps_weights_and_margins_of_pairs_and_none_where_there_are_none(tmp_path):
    rows = plain(4)
    without = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    assert without.pair_weights is None and without.margins is None
    rows[1] |= {"weight": 2.5}
    rows[2] |= {"weight": "0"}
    weighed = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    assert weighed.pair_weights is not None and weighed.margins is None
    rows[3] |= {"margin": -0.5}
    path = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # written, and read again
        found = load(path, tmp_path / "cache")
        assert found.pair_weights is not None and found.margins is not None
        assert found.pair_weights.dtype == found.margins.dtype == np.float32
        assert (found.pair_weights.tolist(), found.margins.tolist()) == ([1, 2.5, 0, 1], [0, 0, 0, -0.5])
        assert (found.report["weights_given"], found.report["margins_given"]) == (2, 1)
    # A run does not go on with others.
    assert len({each.digest for each in (without, weighed, found)}) == 3
    assert contents(without) == contents(found)
    # What compares no answers has no margins.
    alone = found.without_rejected()
    assert alone.margins is None and alone.pair_weights is found.pair_weights


def test_load_skips_rows_of_bad_weights(tmp_path):
    rows = plain(3)
    rows[1] |= {"weight": -2}
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"a\.jsonl:2: 'weight' is -2; expected a number, 0 or more"):
        load(path, tmp_path / "cache")
    found = load(path, tmp_path / "cache", on_bad_row="skip")
    assert len(found) == 2 and found.report["dropped"][0]["reason"] == "'weight' is -N"


def rankings(count):
    """Of two, three, four, two... responses."""
    return [
        {"prompt": f"Is it {i}?", "responses": [f" {n} of {i}" for n in range(size)], "ranks": [*range(1, size + 1)]}
        for i, size in enumerate(2 + i % 3 for i in range(count))
    ]


def unpaired(count):
    return [{"prompt": f"Is it {i}?", "completion": f" yes, {i}", "label": i % 2 == 0} for i in range(count)]


def test_load_makes_pairs_of_rankings_and_counts_rows_and_pairs(tmp_path):
    path = write(tmp_path / "a.jsonl", rankings(4))
    found = load(path, tmp_path / "cache")
    assert found.kind == "paired" and found.lengths.shape == (1 + 3 + 6 + 1, 3)
    assert [found.place(i).rpartition(":")[2] for i in range(11)] == [*"12223333334"]
    expected = [{"prompt": "Is it 1?", "chosen": f" {a} of 1", "rejected": f" {b} of 1"} for a, b in ("01", "02", "12")]
    assert contents(found)[1:4] == contents(load(write(tmp_path / "b.jsonl", expected), tmp_path / "cache"))
    (source,) = found.report["sources"]
    assert (source["rows"], source["pairs"], source["format"]) == (4, 11, "ranked")
    assert (found.report["rows"], found.report["pairs"]) == (4, 11)
    best = load(path, tmp_path / "cache", rankings="best")
    assert (best.report["rows"], best.report["pairs"], best.kind) == (4, 1 + 2 + 3 + 1, "paired")


def test_load_keeps_rankings_whole_with_a_column_for_each_answer(tmp_path):
    tokenizer = make_tokenizer(template=CHATML)
    rows = rankings(4)
    found = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", rankings="whole")
    texts = [formats.render(Row("", row), format="ranked", tokenizer=tokenizer, rankings="whole")[0] for row in rows]
    expected = [o.encoded for o in tokenize.encode(texts, tokenizer, LIMITS) if isinstance(o, tokenize.Outcome)]
    assert found.kind == "ranked" and contents(found) == [ids(pair) for pair in expected]
    assert found.lengths.tolist() == [[*pair.lengths, *[0] * (5 - len(pair.lengths))] for pair in expected]
    assert [tuple(key) for key in found.keys.tolist()] == [keys.content_key(found[i]) for i in range(4)]
    assert found.reference.shape == (4, 4) and not np.isfinite(found.reference).all(1).any()
    assert (found.report["rows"], found.report["pairs"]) == (4, 4)
    alike = load(write(tmp_path / "b.jsonl", rankings(2)[1:]), tmp_path / "cache", rankings="whole")
    assert contents(alike) == [contents(found)[1]] and isinstance(alike.lengths.base, np.memmap)


def test_rankings_of_two_are_said_to_be_rankings(tmp_path):
    found = load(write(tmp_path / "a.jsonl", rankings(1)), tmp_path / "cache", rankings="whole")
    assert found.kind == "ranked" and found.lengths.shape == (1, 3)


def test_load_leaves_the_other_answer_of_unpaired_examples_empty(tmp_path):
    found = load(write(tmp_path / "a.jsonl", unpaired(4)), tmp_path / "cache")
    assert found.kind == "unpaired"
    assert (found.lengths[:, 1:] > 0).tolist() == [[True, False], [False, True]] * 2
    whole = load(write(tmp_path / "b.jsonl", plain(1)), tmp_path / "cache")[0]
    assert found[0].chosen.tolist() == whole.chosen.tolist() and found[0].prompt.tolist() == whole.prompt.tolist()
    assert len({*map(tuple, found.keys.tolist())}) == 4


def test_load_reads_unpaired_examples_and_their_labels_from_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nIs it 0?,yes,True\nIs it 1?,no,false\nIs it 2?,no,0\n")
    found = load(str(path), tmp_path / "cache")
    assert (found.lengths[:, 1] > 0).tolist() == [True, False, False]


def test_load_drops_the_whole_row_if_one_of_its_pairs_is_bad(tmp_path):
    rows = rankings(6)
    rows[2]["responses"][3] = rows[2]["responses"][1] + "<eos>"  # the same tokens, once one has its EOS
    rows[4]["responses"][0] = " "
    path = write(tmp_path / "a.jsonl", rows)
    found = load(path, tmp_path / "cache", on_bad_row="skip")
    assert [source["rows"] for source in found.report["sources"]] == [6]
    assert {found.place(i) for i in range(len(found))} == {f"{path}:{n}" for n in (1, 2, 4, 6)}
    assert len(found) == found.report["pairs"] == 1 + 3 + 1 + 6
    dropped = {entry["reason"]: (entry["rows"], entry["places"]) for entry in found.report["dropped"]}
    assert dropped == {
        "the answers are the same tokens": (1, [f"{path}:3"]),
        "response N is empty": (1, [f"{path}:5"]),
    }
    with pytest.raises(InputError, match=r"a\.jsonl:3: the answers are the same tokens"):
        load(path, tmp_path / "cache")


def test_load_refuses_sources_of_different_kinds(tmp_path):
    one = {
        name: write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("plain", plain(2)), ("ranked", rankings(2)), ("unpaired", unpaired(2)))
    }
    for parts, kinds in (
        ("plain,unpaired", "unpaired examples, and the sources before it have paired ones"),
        ("plain,ranked", "ranked examples"),
    ):
        spec = ",".join(one[name] for name in parts.split(","))
        with pytest.raises(InputError, match=kinds) as caught:
            load(spec, tmp_path / "cache", rankings="whole")
        assert caught.value.place == one[parts.split(",")[1]]
    assert len(load(f"{one['plain']},{one['ranked']}", tmp_path / "cache")) == 2 + 1 + 3  # pairs, all of them


def test_set_without_rejected_answers_has_chosen_ones_alone_and_stays_of_its_kind(tmp_path):
    for kind, rows in (("paired", plain(3)), ("unpaired", unpaired(3)), ("ranked", rankings(3))):
        found = load(write(tmp_path / f"{kind}.jsonl", rows), tmp_path / "cache", rankings="whole")
        chosen = found.without_rejected()
        assert chosen.kind == kind and chosen.reference.shape == (3, 2)
        assert chosen.lengths.tolist() == [[*each[:2], 0] for each in found.lengths.tolist()]
        assert contents(chosen) == [[*ids(pair)[:2], []] for pair in found]


def test_widened_set_has_the_same_pairs_in_more_columns(tmp_path):
    rows = plain(3)
    rows[1] |= {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    found = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    wide = found.widened(4)
    assert contents(wide) == contents(found) and wide.lengths.dtype == found.lengths.dtype
    assert wide.lengths[:, :3].tolist() == found.lengths.tolist() and not wide.lengths[:, 3:].any()
    assert wide.reference[1].tolist() == [-1.5, -2.5, 0, 0]
    assert np.isfinite(wide.reference).all(1).tolist() == [False, True, False]
    assert [keys.content_key(wide[i]) for i in range(3)] == [tuple(key) for key in found.keys.tolist()]
    assert found.widened(2).lengths is found.lengths
    assert wide.widened(2).lengths.shape == (3, 5)  # never narrower: answers would be lost


def test_mismatched_set_has_the_prompts_with_answers_of_others_within_the_limit(tmp_path):
    found = load(write(tmp_path / "a.jsonl", unpaired(6)), tmp_path / "cache")
    other = found.mismatched(max_length=int(found.lengths[:, 0].max()) + 2, place="pairs")
    assert len(other) == 6 and other.lengths[:, 1:].max() == 2
    for i, partner in enumerate(other.answers_of.tolist()):
        assert other[i].prompt.tolist() == found[i].prompt.tolist() and partner != i
        assert other[i].chosen.tolist() == found[partner].chosen[:2].tolist()


# The cache


def refuse(*_, **__):
    pytest.fail("tokenized again")


def test_load_opens_what_an_earlier_call_wrote_wherever_the_file_lies_by_then(tmp_path, monkeypatch):
    rows = with_bad_rows()
    first = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", on_bad_row="skip")
    monkeypatch.setattr(dataset, "encode", refuse)
    moved = write(tmp_path / "b.jsonl", rows)
    again = load(moved, tmp_path / "cache", on_bad_row="skip")
    assert again.digest == first.digest
    assert contents(again) == contents(first) and again.keys.tolist() == first.keys.tolist()
    assert again.place(0) == f"{moved}:1" and again.report["sources"][0]["name"] == moved
    assert {entry["places"][0].rpartition(":")[0] for entry in again.report["dropped"]} == {moved}
    assert isinstance(again.tokens, np.memmap)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 999},
        {"max_length": 65},
        {"max_prompt_length": 31},
        {"truncate_prompt": "keep_start"},
        {"format": "plain"},
        {"on_bad_row": "skip"},
        {"rankings": "best"},
        {"columns": "chosen=rejected,rejected=chosen"},
        {"tokenizer": make_tokenizer(template=CHATML, adds="<bos> $A")},
        {"tokenizer": make_tokenizer(template=BOS_AND_EOS)},
        {"weight": "*2"},
        {"rows": plain(2, 1)},
        {"version": 10**6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_changes_with_everything_that_changes_the_pairs(tmp_path, monkeypatch, change):
    change = dict(change)
    base = load(write(tmp_path / "a.jsonl", plain(2)), tmp_path / "cache").digest
    monkeypatch.setattr(dataset, "CACHE_VERSION", change.pop("version", dataset.CACHE_VERSION))
    path = write(tmp_path / "a.jsonl", change.pop("rows", plain(2)))
    assert load(path + change.pop("weight", ""), tmp_path / "cache", **change).digest != base


def test_content_key_tells_apart_whatever_is_another_pair():
    def key(*sides):
        return keys.content_key(Encoded.of(*(np.array(side, np.int32) for side in sides)))

    same = [key([1, 2], [3], [4]), key([1, 2], [3], [4])]
    others = [key([1], [2, 3], [4]), key([1, 2], [4], [3]), key([1, 2], [3], [5]), key([1, 2], [3, 4], [])]
    others += [key([1, 2], [], [3, 4]), key([1, 2], [3], [4], [5]), key([1, 2], [3], [4], [5], [6])]
    assert same[0] == same[1] and len({same[0], *others}) == 8
    assert all(0 <= half < 2**64 for half in same[0])


def test_content_key_of_a_pair_is_that_of_stores_written_before_rankings():
    high, low = keys.content_key(Encoded.of(*(np.array(side, np.int32) for side in ([1, 2], [3], [4]))))
    assert f"{high:016x}{low:016x}" == "a12a209a4f3ad2c70e93afbe3638674e"
    high, low = keys.content_key(Encoded.of(*(np.array(side, np.int32) for side in ([1, 2], [3, 5], []))))
    assert f"{high:016x}{low:016x}" == "dcd0da07b4312292ae8560c7c1e06e79"


def test_content_key_does_not_depend_on_columns_that_a_set_has_for_longer_rankings():
    two, none = Encoded.of(*(np.array([n], np.int32) for n in (1, 2, 3))), np.array([], np.int32)
    assert keys.content_key(two._replace(others=(none, none))) == keys.content_key(two)


def test_load_gives_the_same_in_chunks_of_any_size(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", with_bad_rows() + plain(4, 20))
    whole = load(path, tmp_path / "one", on_bad_row="skip")
    monkeypatch.setattr(reading, "_CHUNK_ROWS", 2)
    parts = load(path, tmp_path / "two", on_bad_row="skip")
    assert contents(parts) == contents(whole) and parts.report == whole.report
    for name in ("keys", "lengths", "numbers", "source", "starts"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_a_run_killed_on_the_way_leaves_nothing_that_is_read_later(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", plain(6)), tmp_path / "cache"
    calls = []

    def killed_at_the_second_chunk(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tokenize.encode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_CHUNK_ROWS", 3)
        patch.setattr(dataset, "encode", killed_at_the_second_chunk)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            load(path, cache)
    (left,) = cache.iterdir()
    assert left.name.startswith(".") and (left / "tokens.npy").stat().st_size > 128
    assert len(load(path, cache)) == 6


def test_digest_tells_tokens_apart_that_a_template_wrote_on_another_day(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "a.jsonl", chat(2)), make_tokenizer(template="{{ strftime_now('%d') }}" + CHATML)

    def digest(day, cache):
        today = types.SimpleNamespace(now=lambda: datetime.datetime(2026, 1, day))
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        return load(path, tmp_path / cache, tokenizer=tokenizer).digest

    first = digest(1, "a")
    assert digest(2, "a") == first == digest(1, "b") != digest(2, "c")


def test_given_day_decides_the_tokens_and_not_the_day_of_the_call(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "a.jsonl", chat(2)), make_tokenizer(template="{{ strftime_now('%d') }}" + CHATML)
    given = load(path, tmp_path / "a", tokenizer=tokenizer, date="2026-01-03")
    today = types.SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 9))
    monkeypatch.setattr(chat_template_utils, "datetime", today)
    assert load(path, tmp_path / "b", tokenizer=tokenizer, date="2026-01-03").digest == given.digest
    assert str(tokenizer.decode(given[0].prompt)).startswith("03<|im_start|>")
    other = load(path, tmp_path / "a", tokenizer=tokenizer, date="2026-01-04")
    assert other.digest != given.digest
    # A template without a day reads the same entry of the cache on every day.
    first = load(path, tmp_path / "a", date="2026-01-03")
    monkeypatch.setattr(dataset, "read", lambda *_, **__: sources.read(path, split="train"))
    monkeypatch.setattr(dataset, "encode", refuse)
    assert load(path, tmp_path / "a", date="2026-01-04").digest == first.digest


# What templates leave out, and exchanges that long prompts lose

FORGETFUL = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")


def thoughts(count, *, answers=("yes", "no")):
    rows = chat(count)
    for i, row in enumerate(rows):
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[side] = [{"role": "assistant", "content": f"<think>\n{side} {i}\n</think>\n\n{answer}"}]
    return rows


def test_load_says_how_often_a_template_leaves_out_what(tmp_path):
    tokenizer = make_tokenizer(template=FORGETFUL)
    path = write(tmp_path / "a.jsonl", [*chat(2), *thoughts(3)])
    with pytest.raises(InputError, match=rf"reasoning in 6 answers \(such as 'chosen 0' at {re.escape(path)}:3\)"):
        load(path, tmp_path / "cache", tokenizer=tokenizer)
    assert not list((tmp_path / "cache").iterdir())
    found = load(path, tmp_path / "cache", tokenizer=tokenizer, on_template_loss="warn")
    expected = {"part": "reasoning", "side": "answers", "count": 6, "place": f"{path}:3", "text": "chosen 0"}
    assert (len(found), found.report["omitted"]) == (5, [expected])
    (line,) = left_out("train", found.report)
    said = "the model does not get all of the text: reasoning in 6 answers is left out, such as 'chosen 0'"
    assert line == f"train: {said} at {path}:3"
    assert left_out("train", load(path, tmp_path / "cache").report) == []


def test_rows_with_nothing_left_to_compare_count_as_losses_first_and_are_bad_rows_then(tmp_path):
    tokenizer = make_tokenizer(template=FORGETFUL)
    path = write(tmp_path / "a.jsonl", [*chat(1), *thoughts(2, answers=("yes", "yes"))])
    for on_bad_row in ("error", "skip"):
        with pytest.raises(InputError, match="reasoning in 4 answers"):
            load(path, tmp_path / "cache", tokenizer=tokenizer, on_bad_row=on_bad_row)
    with pytest.raises(InputError, match="a.jsonl:2: the answers are equal once the chat template has left out"):
        load(path, tmp_path / "cache", tokenizer=tokenizer, on_template_loss="warn")
    options = {"tokenizer": tokenizer, "on_template_loss": "warn", "on_bad_row": "skip"}
    assert len(load(path, tmp_path / "cache", **options)) == 1


def test_long_conversation_loses_its_oldest_exchanges_and_then_tokens(tmp_path):
    row, tokenizer = chat(1)[0], make_tokenizer(template=CHATML)
    said = [{"role": role, "content": f"{n} {role}"} for n in range(3) for role in ("user", "assistant")]
    row["prompt"] = [{"role": "system", "content": "brief"}, *said, {"role": "user", "content": "last"}]
    path = write(tmp_path / "a.jsonl", [row])
    whole = len(load(path, tmp_path / "cache", max_length=900, max_prompt_length=899)[0].prompt)

    def read(max_prompt, **options):
        limits = {"max_length": max_prompt + 2, "max_prompt_length": max_prompt}
        found = load(path, tmp_path / "cache", **limits, **options)
        names = ("prompts_cut", "prompt_tokens_cut", "exchanges_cut")
        return str(tokenizer.decode(found[0].prompt)), len(found[0].prompt), [found.report[name] for name in names]

    text, size, counts = read(whole - 1)
    assert text.startswith("<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\n1 user") and "last" in text
    assert counts == [1, whole - size, 1]
    text, size, counts = read(40)
    assert text.startswith("<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nlast")
    assert counts == [1, whole - size, 3]
    text, size, counts = read(12)  # the last exchange alone is too long: its tokens are truncated
    assert size == 12 and text.endswith("last<|im_end|>\n<|im_start|>assistant\n") and counts == [1, whole - 12, 3]
    text, size, counts = read(40, truncate_prompt="keep_start")
    assert size == 40 and "0 user" in text and counts == [1, whole - 40, 0]
    with pytest.raises(InputError, match=f"a prompt of {whole} tokens"):
        read(40, truncate_prompt="error")


def test_two_loads_of_the_same_data_at_once_both_succeed(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", plain(3)), tmp_path / "cache"
    others = []

    def overtaken(*args, **options):
        monkeypatch.setattr(dataset, "encode", tokenize.encode)
        others.append(load(path, cache))
        return tokenize.encode(*args, **options)

    monkeypatch.setattr(dataset, "encode", overtaken)
    found = load(path, cache)
    assert contents(found) == contents(others[0]) and len(found) == 3
    assert len([*cache.iterdir()]) == 1 and found.digest == others[0].digest


def test_load_says_that_an_entry_is_damaged(tmp_path):
    path, cache = write(tmp_path / "a.jsonl", plain(3)), tmp_path / "cache"
    load(path, cache)
    (folder,) = cache.iterdir()
    whole = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(whole[:-4])
    with pytest.raises(InputError, match="damaged cache entry") as caught:
        load(path, cache)
    assert caught.value.place == str(folder) and "Delete" in caught.value.remedy


def test_load_says_that_the_cache_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as caught:
        load(write(tmp_path / "a.jsonl", plain(1)), tmp_path / "file")
    assert "data.cache_dir" in caught.value.remedy


def test_default_cache_follows_the_environment(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", plain(1))
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(path, "")
    assert len([*(tmp_path / "own/pairs").glob("*/tokens.npy")]) == 1
    monkeypatch.delenv("DPO_JAX_CACHE")
    assert files.cache_folder("pairs") == tmp_path / "xdg/dpo_jax/pairs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder("pairs") == Path.home() / ".cache/dpo_jax/pairs"


@pytest.mark.slow
def test_memory_stays_flat_as_the_data_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK_ROWS", 20)
    tokenizer = make_tokenizer()
    load(write(tmp_path / "warm.jsonl", plain(20)), tmp_path / "cache", tokenizer=tokenizer)
    peaks = []
    for count in (100, 800):
        path = write(tmp_path / f"{count}.jsonl", plain(count))
        tracemalloc.start()
        load(path, tmp_path / "cache", tokenizer=tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.skipif(not (HH.exists() and NEOX.exists()), reason="needs HH and the GPT-NeoX tokenizer in ../shared/data")
def test_load_keeps_the_header_and_one_eos_on_every_real_pair(tmp_path):
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), bos_token=end, eos_token=end, pad_token=end)
    limits: dict[str, Any] = {"vocab_size": 50304, "max_length": 512, "max_prompt_length": 256}
    found = load(str(HH), tmp_path / "cache", tokenizer=tokenizer, on_bad_row="skip", **limits)
    report = found.report
    assert report["sources"][0]["format"] == "hh" and report["boundary_split"] == 0
    assert (report["rows"], report["pairs"], report["dropped"][0]["reason"]) == (1435, 1432, "'chosen' is empty")
    header = tokenizer("\n\nAssistant:")["input_ids"]
    ended = 0
    for pair in found:
        assert pair.prompt[-len(header) :].tolist() == header
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 512
        for answer in (pair.chosen, pair.rejected):
            assert not (answer[:-1] == tokenizer.eos_token_id).any()
            ended += int(answer[-1] == tokenizer.eos_token_id)
    assert ended == 2 * len(found) - report["answers_cut"]
