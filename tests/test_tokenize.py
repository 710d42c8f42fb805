import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import tokenize
from dpo_jax.data.formats import render
from dpo_jax.types import InputError, Pair, Row
from tests.support.tokenizers_made import BOS_AND_EOS, CHATML, THINKING, make_tokenizer

NEOX = Path(__file__).parents[2] / "shared/data/gpt_neox_20b_tokenizer.json"
PAIR = Pair("a.jsonl:1", "Human: is the sky blue?\n\nAssistant:", " yes, the sky is blue.", " no")
CHAT = {
    "prompt": [{"role": "user", "content": "the sky"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
LIMITS = tokenize.TokenizationRules(vocab_size=1000, max_length=512, max_prompt_length=256, truncate_prompt="keep_end")


def encode(pairs, tokenizer, **limits):
    return tokenize.encode(pairs, tokenizer, dataclasses.replace(LIMITS, **limits))


def encode_one(pair, tokenizer, **limits):
    (outcome,) = encode([pair], tokenizer, **limits)
    assert isinstance(outcome, tokenize.Outcome), outcome
    return outcome


def fault(pair, tokenizer, **limits):
    """The error that stands in for a pair."""
    (error,) = encode([pair], tokenizer, **limits)
    assert isinstance(error, InputError) and error.place == pair.place
    return error


def sides(encoded):
    """Prompt and answers."""
    return encoded.prompt, *encoded.answers


def words(tokenizer, encoded):
    return [str(tokenizer.decode(ids)) for ids in sides(encoded)]


# The boundary


def test_encode_keeps_the_ids_that_prompt_and_answer_have_together():
    tokenizer = make_tokenizer()
    outcome = encode_one(PAIR, tokenizer)
    encoded = outcome.encoded
    for side, text in ((encoded.chosen, PAIR.chosen), (encoded.rejected, PAIR.rejected)):
        assert [*encoded.prompt, *side[:-1]] == tokenizer(PAIR.prompt + text)["input_ids"]
    assert encoded.prompt.tolist() == tokenizer(PAIR.prompt)["input_ids"]
    assert outcome == tokenize.Outcome(encoded, answer_cuts=(0, 0))
    assert all(ids.dtype == np.int32 for ids in sides(encoded))


@pytest.mark.parametrize(("chosen", "rejected"), [("the sky", "\nno"), ("\nno", "the sky"), ("the sky", "sky")])
def test_encode_tokenizes_both_answers_apart_when_a_token_would_reach_across(chosen, rejected):
    tokenizer = make_tokenizer()
    pair = Pair("a:1", "is ", chosen, rejected)  # " the" and " sky" are one token each
    together = tokenizer("is the")["input_ids"]
    assert together[: len(tokenizer("is ")["input_ids"])] != tokenizer("is ")["input_ids"]
    outcome = encode_one(pair, tokenizer)
    assert outcome.boundary_split
    assert outcome.encoded.prompt.tolist() == tokenizer(pair.prompt)["input_ids"]
    assert outcome.encoded.chosen.tolist() == tokenizer(chosen + "<eos>")["input_ids"]
    assert outcome.encoded.rejected.tolist() == tokenizer(rejected + "<eos>")["input_ids"]


def test_encode_gives_each_pair_what_it_would_get_alone():
    tokenizer = make_tokenizer(adds="<bos> $A", template=CHATML)
    merging = [Pair("a:2", "is ", "the", "sky"), Pair("a:4", "the ", "sky", "blue")]
    (chat,) = render(Row("a:3", CHAT), format="chat", tokenizer=tokenizer)
    pairs = [PAIR, merging[0], chat, merging[1], PAIR]
    for pair, outcome in zip(pairs, encode(pairs, tokenizer), strict=True):
        assert isinstance(outcome, tokenize.Outcome)
        alone = encode_one(pair, tokenizer)
        assert [ids.tolist() for ids in sides(outcome.encoded)] == [ids.tolist() for ids in sides(alone.encoded)]
        assert outcome[1:] == alone[1:]
    assert encode([], tokenizer) == []


# BOS and EOS


@pytest.mark.parametrize(
    ("adds", "first"), [("$A", ""), ("<bos> $A", "<bos>"), ("$A <eos>", ""), ("<bos> $A <eos>", "<bos>")]
)
def test_encode_starts_plain_text_as_the_tokenizer_does_and_ends_it_with_one_eos(adds, first):
    tokenizer = make_tokenizer(adds=adds)
    prompt, chosen, rejected = words(tokenizer, encode_one(PAIR, tokenizer).encoded)
    assert prompt == first + PAIR.prompt
    assert (chosen, rejected) == (PAIR.chosen + "<eos>", PAIR.rejected + "<eos>")


def test_encode_adds_no_second_bos_or_eos_to_text_that_has_them():
    tokenizer = make_tokenizer(adds="<bos> $A <eos>")
    pair = Pair("a:1", "<bos>the sky", " is blue<eos>", " is")
    prompt, chosen, rejected = words(tokenizer, encode_one(pair, tokenizer).encoded)
    assert (prompt, chosen, rejected) == ("<bos>the sky", " is blue<eos>", " is<eos>")


def test_encode_keeps_the_real_eos_when_the_pad_token_is_the_same():
    outcomes = [encode_one(PAIR, make_tokenizer(pad=pad)) for pad in (None, "<eos>")]
    assert outcomes[0].encoded.chosen.tolist() == outcomes[1].encoded.chosen.tolist()
    assert outcomes[1].encoded.chosen[-1] == make_tokenizer().eos_token_id


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (BOS_AND_EOS, "<eos>")])
def test_encode_adds_nothing_to_templated_text(template, end):
    tokenizer = make_tokenizer(adds="<bos> $A <eos>", template=template)
    (pair,) = render(Row("a:1", CHAT), format="chat", tokenizer=tokenizer)
    prompt, chosen, _ = words(tokenizer, encode_one(pair, tokenizer).encoded)
    assert (prompt, chosen) == (pair.prompt, pair.chosen)
    assert chosen.endswith("yes" + end) and chosen.count(end) == 1


@pytest.mark.parametrize("template", [CHATML, THINKING, BOS_AND_EOS])
def test_encode_gives_chat_the_ids_that_transformers_gives_the_conversation(template):
    tokenizer = make_tokenizer(adds="<bos> $A <eos>", template=template)
    (pair,) = render(Row("a:1", CHAT), format="chat", tokenizer=tokenizer)
    encoded = encode_one(pair, tokenizer).encoded
    for name, answer in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
        whole = tokenizer.apply_chat_template(CHAT["prompt"] + CHAT[name], tokenize=True, return_dict=False)
        assert [*encoded.prompt, *answer] == whole


def test_encode_takes_an_empty_prompt_only_where_bos_precedes_it():
    pair = Pair("a:1", "", "the sky", "blue")
    assert words(make_tokenizer(), encode_one(pair, make_tokenizer(adds="<bos> $A")).encoded)[0] == "<bos>"
    assert fault(pair, make_tokenizer()).got == "the tokenizer makes no token of 'prompt'"


def test_encode_needs_an_eos_token_for_plain_text_only():
    tokenizer = make_tokenizer(template=CHATML)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"a\.jsonl:1: plain text, and a tokenizer without an eos_token") as caught:
        encode([PAIR], tokenizer)
    assert "tokenizer_config.json" in caught.value.remedy and "config.json names by eos_token_id" in caught.value.remedy
    (pair,) = render(Row("a:1", CHAT), format="chat", tokenizer=tokenizer)
    assert words(tokenizer, encode_one(pair, tokenizer).encoded)[1] == pair.chosen


# Truncation: digits and capitals are one token each


def letters(prompt, chosen, rejected="Z"):
    return Pair("a:1", "0123456789"[:prompt], "NOPQRSTUVWXYZ"[:chosen], rejected)


@pytest.mark.parametrize(
    ("adds", "mode", "expected", "cuts"),
    [
        ("$A", "keep_end", ("6789", "NOPQRS", "Z<eos>"), (6, 3, 0)),
        ("$A", "keep_start", ("0123", "NOPQRS", "Z<eos>"), (6, 3, 0)),
        ("<bos> $A", "keep_end", ("<bos>789", "NOPQRS", "Z<eos>"), (7, 3, 0)),
        ("<bos> $A", "keep_start", ("<bos>012", "NOPQRS", "Z<eos>"), (7, 3, 0)),
    ],
)
def test_encode_cuts_the_prompt_first_then_each_answer(adds, mode, expected, cuts):
    tokenizer = make_tokenizer(adds=adds)
    outcome = encode_one(letters(10, 8), tokenizer, max_length=10, max_prompt_length=4, truncate_prompt=mode)
    assert tuple(words(tokenizer, outcome.encoded)) == expected
    assert (outcome.prompt_cut, *outcome.answer_cuts) == cuts


@pytest.mark.parametrize(
    ("prompt", "chosen", "cuts"),
    [
        (10, 4, (0, 0, 0)),  # 10 and 5 with EOS fill 15: a prompt above its limit stays whole
        (10, 5, (6, 0, 0)),
        (4, 10, (0, 0, 0)),
        (4, 11, (0, 1, 0)),  # only EOS is cut
        (3, 12, (0, 1, 0)),
    ],
)
def test_encode_cuts_nothing_before_it_must(prompt, chosen, cuts):
    outcome = encode_one(letters(prompt, chosen), make_tokenizer(), max_length=15, max_prompt_length=4)
    assert (outcome.prompt_cut, *outcome.answer_cuts) == cuts
    assert outcome.encoded.chosen[-1] != make_tokenizer().eos_token_id or not cuts[1]


def test_encode_keeps_the_assistant_header_when_it_cuts_the_prompt():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + CHATML)
    fields = {**CHAT, "prompt": [{"role": "user", "content": "the sky " * 50}]}
    (pair,) = render(Row("a:1", fields), format="chat", tokenizer=tokenizer)
    outcome = encode_one(pair, tokenizer, max_length=40, max_prompt_length=30)
    prompt = words(tokenizer, outcome.encoded)[0]
    assert prompt.startswith("<bos>") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len(outcome.encoded.prompt) == 30 and outcome.prompt_cut > 0


@pytest.mark.parametrize(("size", "left"), [(1, "<bos>"), (2, "<bos><|im_start|>"), (3, "<bos><|im_start|>9")])
def test_encode_cuts_a_prompt_down_to_what_the_tokenizer_puts_first(size, left):
    tokenizer = make_tokenizer(adds="<bos> <|im_start|> $A")
    outcome = encode_one(letters(10, 8), tokenizer, max_length=6, max_prompt_length=size)
    assert words(tokenizer, outcome.encoded)[0] == left


def test_encode_refuses_a_long_prompt_if_asked_to():
    limits = {"max_length": 10, "max_prompt_length": 4, "truncate_prompt": "error"}
    error = fault(letters(8, 8), make_tokenizer(), **limits)
    assert "a prompt of 8 tokens" in error.got and error.expected == "at most data.max_prompt_length 4"
    assert "data.on_bad_row" in error.remedy
    encode_one(letters(8, 1), make_tokenizer(), **limits)  # fits as it is
    assert encode_one(letters(4, 8), make_tokenizer(), **limits).answer_cuts == (3, 0)


def test_encode_refuses_answers_that_truncation_makes_equal():
    pair = letters(3, 8, "NOPQRZ")
    limits = {"max_length": 8, "max_prompt_length": 4}
    assert "the same tokens after truncation to data.max_length 8" in fault(pair, make_tokenizer(), **limits).got
    encode_one(pair, make_tokenizer(), **{**limits, "max_length": 9})


def test_encode_refuses_answers_that_are_the_same_tokens_from_the_start():
    pair = Pair("a:1", "the sky", " is<eos>", " is")
    assert fault(pair, make_tokenizer()).got == "the answers are the same tokens"


@pytest.mark.parametrize(
    ("limits", "place"),
    [
        ({"truncate_prompt": "left"}, "config.data.truncate_prompt"),
        ({"max_prompt_length": 0}, "config.data.max_prompt_length"),
        ({"max_length": 256}, "config.data.max_prompt_length"),
    ],
)
def test_encode_refuses_bad_options(limits, place):
    with pytest.raises(InputError) as caught:
        encode([PAIR], make_tokenizer(), **limits)
    assert caught.value.place == place


# The vocabulary and the tokenizer's identity


def test_encode_refuses_ids_that_the_model_does_not_have():
    tokenizer = make_tokenizer()
    pair = Pair("a.jsonl:7", "<bos>", "<|im_start|>", "<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids(["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    assert ids == [0, 1, 2, 3]
    encode_one(pair, tokenizer, vocab_size=4)
    with pytest.raises(InputError, match=re.escape("a.jsonl:7: uses '<|im_end|>' (id 3); expected ids below 3")):
        encode([Pair("a.jsonl:6", "<bos>", "<bos><eos>", "<eos>"), pair], tokenizer, vocab_size=3)


def test_encode_names_each_token_without_an_embedding_once_and_the_first_few_of_many():
    tokenizer = make_tokenizer()
    with pytest.raises(InputError) as caught:
        encode([Pair("a:1", "<|im_start|>ab", "<|im_end|>abc", "<|im_start|>defg")], tokenizer, vocab_size=2)
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    assert caught.value.got == (
        f"uses '<|im_start|>' (id 2), '<|im_end|>' (id 3), 'a' (id {a}), 'b' (id {b}), 'c' (id {c}) and 4 more"
    )
    assert "resize_token_embeddings" in caught.value.remedy and "tokenizer.path" in caught.value.remedy


def test_identity_changes_with_the_tokenizer_and_the_template_and_with_nothing_else():
    base = make_tokenizer(template=CHATML)
    assert tokenize.identity(base) == tokenize.identity(make_tokenizer(template=CHATML))
    before = tokenize.identity(base)
    base(["the sky is blue"], truncation=True, max_length=2)  # leaves its truncation behind in the backend
    assert tokenize.identity(base) == before
    for other, changed in (
        (make_tokenizer(template=CHATML, adds="<bos> $A"), {"tokenizer"}),
        (make_tokenizer(template=CHATML, bos="<|im_start|>"), {"tokenizer"}),
        (make_tokenizer(template=BOS_AND_EOS), {"template"}),
        (make_tokenizer(), {"template"}),
    ):
        assert {k for k, v in tokenize.identity(other).items() if v != before[k]} == changed


def test_load_tokenizer_gives_back_what_was_saved(tmp_path):
    saved = make_tokenizer(adds="<bos> $A", template=CHATML)
    saved.save_pretrained(tmp_path)
    loaded = tokenize.load_tokenizer(str(tmp_path))
    assert tokenize.identity(loaded)["template"] == tokenize.identity(saved)["template"]
    assert words(loaded, encode_one(PAIR, loaded).encoded) == words(saved, encode_one(PAIR, saved).encoded)


def test_load_tokenizer_says_that_there_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError) as caught:
            tokenize.load_tokenizer(str(path))
        assert str(path) in caught.value.place and "tokenizer.json" in caught.value.expected


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer.model": b"\n\x0e\n\x05<unk>"}, ".tokenizer.model has to.*`pip install sentencepiece protobuf`"),
        ({"tokenizer.model": b"aGVsbG8= 0\nIQ== 1\n"}, ".tokenizer.model has to.*`pip install tiktoken`"),
        ({"config.json": b"{}"}, "no vocabulary in this folder"),
        (None, ".its vocabulary has to.*`pip install sentencepiece protobuf`"),
    ],
)
def test_load_tokenizer_names_the_packages_that_convert_a_vocabulary(tmp_path, monkeypatch, files, said):
    """What transformers says where none of them is installed is of tiktoken alone."""

    def refuse(*args, **kwargs):
        raise ImportError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(tokenize.AutoTokenizer, "from_pretrained", refuse)
    for name, content in (files or {}).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        tokenize.load_tokenizer(str(tmp_path if files else "owner/name"))


@pytest.mark.parametrize(
    "described, said",
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "no tokens but <s>, </s>, <unk>"),
        (
            {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
            "code of its own, which is",
        ),
    ],
)
def test_load_tokenizer_refuses_a_class_without_vocabulary_or_with_code(tmp_path, described, said):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=said):
        tokenize.load_tokenizer(str(tmp_path))


def test_load_tokenizer_needs_no_more_than_a_tokenizer_json(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenize.load_tokenizer(str(tmp_path))("the sky").input_ids == make_tokenizer()("the sky").input_ids


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared/data/gpt_neox_20b_tokenizer.json")
def test_encode_handles_a_tokenizer_whose_bos_eos_and_pad_are_one_token():
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(NEOX), bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
    encoded = encode_one(PAIR, tokenizer, vocab_size=50304).encoded
    assert words(tokenizer, encoded) == [PAIR.prompt, PAIR.chosen + end, PAIR.rejected + end]
    assert tokenizer(PAIR.prompt)["input_ids"] == encoded.prompt.tolist()


def test_encode_refuses_a_reference_of_tokens_that_are_cut():
    # Log-probs of the whole answer beside a policy scored on a part of it would be a margin out of nothing.
    tokenizer = make_tokenizer()
    long = Pair("a:7", "is ", " the sky" * 40, " no", reference=(-1.0, -2.0))
    assert (
        "reference log-probs of a pair that data.max_length 16 cuts"
        in fault(long, tokenizer, max_length=16, max_prompt_length=8).got
    )
    assert encode_one(long, tokenizer).encoded.chosen.size > 16


def test_encode_finds_bos_where_the_tokenizer_knows_few_letters():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<bos>": 0, "<eos>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    encoded = encode_one(Pair("dna:1", "ACG", "TT", "GA"), tokenizer).encoded
    assert [ids.tolist() for ids in sides(encoded)] == [[0, 2, 3, 4], [5, 5, 1], [4, 2, 1]]


# More answers than two, and fewer


def test_encode_gives_a_ranking_the_answers_that_its_pairs_get():
    tokenizer = make_tokenizer(adds="<bos> $A")
    answers = " yes, the sky is blue.", " no", " the sky", " is it?"
    whole = encode_one(Pair("a:1", PAIR.prompt, *answers[:2], answers[2:]), tokenizer)
    ids = [side.tolist() for side in sides(whole.encoded)]
    for side, text in enumerate(answers):
        other = answers[side - 1]
        pair = encode_one(Pair("a:1", PAIR.prompt, text, other), tokenizer).encoded
        assert [pair.prompt.tolist(), pair.chosen.tolist()] == [ids[0], ids[1 + side]]
    assert whole.answer_cuts == (0, 0, 0, 0) and not whole.boundary_split


def test_encode_tokenizes_all_answers_apart_when_one_would_merge_with_the_prompt():
    tokenizer = make_tokenizer()
    outcome = encode_one(Pair("a:1", "is ", "\nno", "well", ("the sky", "blue")), tokenizer)
    assert outcome.boundary_split
    assert words(tokenizer, outcome.encoded) == ["is ", "\nno<eos>", "well<eos>", "the sky<eos>", "blue<eos>"]
    assert outcome.encoded.others[0].tolist() == tokenizer("the sky<eos>")["input_ids"]


def test_encode_gives_an_answer_that_is_not_there_no_token():
    for adds in ("$A", "<bos> $A <eos>"):
        tokenizer = make_tokenizer(adds=adds)
        for prompt, text in ((PAIR.prompt, " yes"), ("is ", "the")):  # the second is tokenized apart
            pair = encode_one(Pair("a:1", prompt, text, " no"), tokenizer).encoded
            first = encode_one(Pair("a:1", prompt, text, ""), tokenizer).encoded
            second = encode_one(Pair("a:1", prompt, "", text), tokenizer).encoded
            assert first.chosen.tolist() == second.rejected.tolist() == pair.chosen.tolist()
            assert len(first.rejected) == len(second.chosen) == 0
            assert first.prompt.tolist() == second.prompt.tolist() == pair.prompt.tolist()
            assert first.rejected.dtype == np.int32


def test_encode_learns_bos_from_an_answer_that_is_there():
    tokenizer = make_tokenizer(adds="<bos> $A")
    pairs = [Pair("a:1", "is ", "", "blue"), PAIR]
    for outcome in encode(pairs, tokenizer):
        assert isinstance(outcome, tokenize.Outcome)
        assert words(tokenizer, outcome.encoded)[0].startswith("<bos>")


def test_encode_takes_the_longest_answer_of_a_ranking_for_truncation_and_cuts_each():
    tokenizer = make_tokenizer()
    short, long = Pair("a:1", "0123456789", "N", "Z"), Pair("a:1", "0123456789", "N", "Z", ("OPQRSTUVW", "OPQ"))
    limits = {"max_length": 12, "max_prompt_length": 4}
    assert encode_one(short, tokenizer, **limits).prompt_cut == 0
    outcome = encode_one(long, tokenizer, **limits)
    assert words(tokenizer, outcome.encoded) == ["6789", "N<eos>", "Z<eos>", "OPQRSTUV", "OPQ<eos>"]
    assert (outcome.prompt_cut, outcome.answer_cuts) == (6, (0, 0, 2, 0))


def test_encode_refuses_any_two_answers_that_are_the_same_tokens():
    pair = Pair("a:1", "0123", "NOPQ", "Z", ("NOPQRS", "NOPQRT"))
    limits = {"max_prompt_length": 2}
    for size, which in ((6, "answers 1 and 3"), (7, "answers 3 and 4")):
        error = fault(pair, make_tokenizer(), max_length=size, **limits)
        assert error.got == f"{which} are the same tokens after truncation to data.max_length {size}"
    encode_one(pair, make_tokenizer(), max_length=8, **limits)
    same = Pair("a:1", "the sky", " blue", " is<eos>", (" is",))
    assert fault(same, make_tokenizer()).got == "answers 2 and 3 are the same tokens"


def test_encode_names_the_answer_of_a_ranking_without_a_token():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>": 0, "A": 1, "C": 2, "G": 3}, []))
    backend.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert fault(Pair("dna:1", "A", "C", "G", ("x",)), tokenizer).got == "the tokenizer makes no token of 'answer 3'"
    assert fault(Pair("dna:1", "A", "", "x"), tokenizer).got == "the tokenizer makes no token of 'rejected'"


def test_encode_refuses_ids_of_any_answer_that_the_model_does_not_have():
    with pytest.raises(InputError, match=re.escape("uses '<|im_end|>' (id 3); expected ids below 3")):
        encode([Pair("a:1", "<bos>", "<bos><eos>", "<eos>", ("<|im_end|>",))], make_tokenizer(), vocab_size=3)
