"""Checkpoints as people have them: vocabularies grown or resized, special tokens that differ, no pad token."""

import json

import numpy as np
import pytest

from dpo_jax import cli, train, trees
from dpo_jax.data import dataset, notices, special_tokens, tokenize
from dpo_jax.hf import checkpoints, folders
from dpo_jax.reporting import console
from dpo_jax.run import choices
from dpo_jax.run import inputs as run_inputs
from dpo_jax.types import InputError
from tests.support.hf_folders import LLAMA, NEOX, edit_config, edit_weights, load, save
from tests.support.runs import load_inputs, make_config
from tests.support.tokenizers_made import BOS_AND_EOS, CHATML, THINKING, make_tokenizer

TOKENS = len(make_tokenizer())  # <bos>, <eos>, <|im_start|> and <|im_end|> are 0 to 3
PLAIN = [{"prompt": f"is it {i}?", "chosen": " yes, the sky", "rejected": " no"} for i in range(4)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PLAIN
]


def write(folder, rows, tokenizer, *, vocab_size=TOKENS, generation=None, family=LLAMA, **hf):
    """Writes data, a model and its tokenizer into the folder; returns a configuration over them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "model", family | dict(vocab_size=vocab_size) | hf)
    if generation is not None:
        (folder / "model" / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save_pretrained(folder / "model")
    return make_config(folder, data__eval="", train__batch_pairs=4)


def warnings(*args, **options):
    return list(load_inputs(write(*args, **options), training=True).warnings)


def grown(*tokens, **options):
    tokenizer = make_tokenizer(**options)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


# Vocabularies of another size


def test_tokens_without_an_embedding_are_a_warning_where_no_text_uses_them(tmp_path):
    assert warnings(tmp_path, PLAIN, grown("<x>", "<y>")) == [
        f"the tokenizer has {TOKENS + 2} tokens and the model's vocab_size is {TOKENS}: the data use none of "
        f"those beyond it, '<x>' (id {TOKENS}), '<y>' (id {TOKENS + 1})"
    ]
    assert warnings(tmp_path / "resized", PLAIN, grown("<x>", "<y>"), vocab_size=TOKENS + 2) == []


def test_tokens_without_an_embedding_that_only_a_template_writes_are_refused(tmp_path):
    template = CHATML.replace("<|im_start|>", "<x>").replace("<|im_end|>", "<y>")
    config = write(tmp_path, CHAT, grown("<x>", "<y>", template=template))
    with pytest.raises(InputError) as caught:
        load_inputs(config, training=True)
    assert caught.value.place == f"{tmp_path / 'train.jsonl'}:1"
    assert caught.value.got == f"uses '<x>' (id {TOKENS}), '<y>' (id {TOKENS + 1})"
    assert "resize_token_embeddings" in caught.value.remedy and "tokenizer.path" in caught.value.remedy


def resize(tensors, rows, names):
    for name in names:
        tensors[name] = np.resize(tensors[name], (rows, tensors[name].shape[1]))


EMBEDDINGS = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


@pytest.mark.parametrize("rows", [TOKENS + 3, TOKENS - 3])
@pytest.mark.parametrize("family", [LLAMA, NEOX], ids=lambda hf: hf["model_type"])
def test_resized_embeddings_that_config_json_does_not_tell_of_are_refused(tmp_path, family, rows):
    config = write(tmp_path, PLAIN, make_tokenizer(), family=family)
    names = EMBEDDINGS[family["model_type"]]
    edit_weights(tmp_path / "model", lambda tensors: resize(tensors, rows, names))
    with pytest.raises(InputError) as caught:
        run_inputs.read_inputs(config, choices.objective_of(config.loss), tmp_path, training=True)
    assert caught.value.place == f"{tmp_path / 'model' / 'config.json'}: vocab_size"
    assert caught.value.got == f"got {TOKENS}, and {names[0]} is [{rows}, 16], {names[1]} is [{rows}, 16]"
    assert f"Set it to {rows} there" in caught.value.remedy
    edit_config(tmp_path / "model", vocab_size=rows)
    checkpoints.check_weights(tmp_path / "model", checkpoints.read_config(tmp_path / "model")[0])


def test_embeddings_of_which_one_was_resized_are_refused_as_misshapen(tmp_path):
    config = write(tmp_path, PLAIN, make_tokenizer())
    edit_weights(tmp_path / "model", lambda tensors: resize(tensors, TOKENS + 3, ["lm_head.weight"]))
    with pytest.raises(InputError, match=rf"lm_head.weight is \[{TOKENS + 3}, 16\], not \[{TOKENS}, 16\]"):
        run_inputs.read_inputs(config, choices.objective_of(config.loss), tmp_path, training=True)


def test_weights_are_checked_before_any_program_is_made(tmp_path, monkeypatch):
    config = write(tmp_path, PLAIN, make_tokenizer())
    edit_weights(tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(train, "make_programs", lambda *_, **__: pytest.fail("touched a device"))
    with pytest.raises(InputError, match="missing model.norm.weight"):
        train.run(config, tmp_path / "run")


# No pad token


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_a_pad_token_changes_no_token_of_a_pair(tmp_path, pad):
    tokenizer = make_tokenizer(pad=pad)
    assert (tokenizer.pad_token_id is None) == (pad is None)
    found = load_inputs(write(tmp_path, PLAIN, tokenizer, vocab_size=TOKENS + 1), training=True).sets["train"]
    without = load_inputs(write(tmp_path, PLAIN, make_tokenizer(), vocab_size=TOKENS + 1), training=True)
    assert found.keys.tolist() == without.sets["train"].keys.tolist()  # digests of the ids


# Special tokens that the model's files name


SPECIALS = {
    0: "'<bos>' (id 0)",
    1: "'<eos>' (id 1)",
    2: "'<|im_start|>' (id 2)",
    999: "id 999, which the tokenizer lacks",
}


@pytest.mark.parametrize(
    ("config", "own", "differs"),
    [
        ({}, "<bos>", False),
        ({"bos_token_id": None}, "<bos>", False),
        ({"bos_token_id": 0}, "<bos>", False),
        ({"bos_token_id": 2}, "<bos>", True),
        ({"bos_token_id": 999}, "<bos>", True),
        ({"bos_token_id": 2}, None, False),  # Qwen's tokenizer has none
        ({"bos_token_id": 999}, None, True),
        ({"bos_token_id": -1}, None, True),
    ],
)
def test_bos_that_differs_is_a_warning(config, own, differs):
    tokenizer = make_tokenizer(bos=own)
    lines = special_tokens.disagreements(tokenizer, vocab_size=1000, config=config, generation={})
    theirs = {**SPECIALS, -1: "id -1, which the tokenizer lacks"}.get(config.get("bos_token_id"))
    expected = f"bos_token_id in config.json is {theirs}; the tokenizer's own is {SPECIALS[0] if own else 'none'}"
    assert lines == ([expected] if differs else [])


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        (None, None, ""),
        (1, None, ""),
        (2, None, f"config.json, where generation stops, is {SPECIALS[2]}"),
        ([2, 1], None, ""),
        (2, 1, ""),  # generation_config.json is what transformers reads
        (2, [2, 1], ""),
        (1, [2], f"generation_config.json, where generation stops, is {SPECIALS[2]}"),
        (1, [0, 2], f"generation_config.json, where generation stops, is {SPECIALS[0]}, {SPECIALS[2]}"),
        ([1, 999], None, f"config.json, where generation stops, is {SPECIALS[1]}, {SPECIALS[999]}"),
        (True, "1", ""),
    ],
)
def test_eos_at_which_generation_does_not_stop_is_a_warning(config, generation, said):
    files = {"config": {"eos_token_id": config}, "generation": {"eos_token_id": generation}}
    lines = special_tokens.disagreements(make_tokenizer(), vocab_size=1000, **files)
    own = f"the tokenizer's own, which ends answers in plain text, is {SPECIALS[1]}"
    assert lines == ([f"eos_token_id in {said}; {own}"] if said else [])


def test_plain_text_ends_in_the_tokenizers_eos_whatever_the_model_names(tmp_path):
    config = write(tmp_path, PLAIN, make_tokenizer(), generation={"eos_token_id": [2, 3]}, eos_token_id=2)
    found = load_inputs(config, training=True)
    assert {int(found.sets["train"][i].chosen[-1]) for i in range(4)} == {1}
    assert len(found.warnings) == 1 and "eos_token_id in generation_config.json" in found.warnings[0]


@pytest.mark.parametrize(
    ("template", "stops", "endless"),
    [
        (CHATML, [1, 3], False),
        (CHATML, [1], True),  # as a base model's files with a chat template
        (THINKING, [1], True),
        (BOS_AND_EOS, [1], False),
        (CHATML.replace("<|im_end|>", ""), [1, 3], True),
    ],
)
def test_template_whose_answers_end_where_generation_does_not_is_a_warning(tmp_path, template, stops, endless):
    lines = warnings(tmp_path, CHAT, make_tokenizer(template=template), generation={"eos_token_id": stops})
    assert len(lines) == endless
    if endless:
        assert f"4 of 4 answers checked in train end in no token that stops generation ({SPECIALS[1]}" in lines[0]
        assert f"{tmp_path / 'train.jsonl'}:1 ends in " in lines[0]


def test_answers_that_were_cut_are_not_said_to_be_endless(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [PLAIN[0] | {"chosen": " yes" * size} for size in (1, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    found = dataset.load(
        str(path),
        split="train",
        reading=dataset.ReadingRules(format="plain", on_bad_row="error", rankings="all"),
        tokenizer=tokenizer,
        tokenization=tokenize.TokenizationRules(
            TOKENS, max_length=32, max_prompt_length=16, truncate_prompt="keep_end"
        ),
        cache_dir=str(tmp_path / "cache"),
    )
    assert found.report["answers_cut"] == 1

    def lines(max_length):
        return special_tokens.unended("train", found, tokenizer, max_length=max_length, config={}, generation={})

    assert lines(32) == []
    assert "1 of 2 answers" in lines(33)[0] and f"{path}:2" in lines(33)[0]  # had it been allowed one more


WRITTEN = [{"prompt": "<|im_start|>user\nis<|im_end|>\n", "chosen": "b<|im_end|>", "rejected": "c<|im_end|>"}]


@pytest.mark.parametrize(
    ("rows", "template", "how"),
    [
        (PLAIN, CHATML, "give --config.data.format=chat"),
        (
            [{"prompt": "is", "completion": "b", "label": True}],
            CHATML,
            "write messages in place of text, or add a column 'system'",
        ),
        (PLAIN, None, ""),
        (CHAT, CHATML, ""),
        (WRITTEN, CHATML, ""),
    ],
)
def test_text_that_a_chat_template_could_have_written_is_a_warning(tmp_path, rows, template, how):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(template=template)
    found = dataset.load(
        str(path),
        split="train",
        reading=dataset.ReadingRules(format="auto", on_bad_row="error", rankings="all"),
        tokenizer=tokenizer,
        tokenization=tokenize.TokenizationRules(
            TOKENS, max_length=32, max_prompt_length=16, truncate_prompt="keep_end"
        ),
        cache_dir=str(tmp_path / "cache"),
    )
    lines = notices.untemplated("train", found, tokenizer)
    assert len(lines) == bool(how) and all(str(path) in line and line.endswith(f", {how}") for line in lines)


def test_sources_are_warned_of_together():
    report = {"unread": ["id"], "unread_keys": ["name"]}
    lines = notices.unread("train", {"sources": [{"name": name, **report} for name in ("a", "b")]})
    assert ["of a, b" in line and "'id'" in line for line in lines] == [True, False]
    assert "keys 'name' of the messages of a, b" in lines[1] and len(lines) == 2


def test_columns_that_nothing_reads_are_a_warning(tmp_path):
    config = write(tmp_path, [PLAIN[0] | {"n": 1}, PLAIN[1] | {"\x1b": 2}], make_tokenizer(), eos_token_id=1)
    (line,) = (line for line in load_inputs(config, training=True).warnings if "nothing reads" in line)
    assert f"the columns 'n', '\\x1b' of {tmp_path / 'train.jsonl'}" in line


def test_a_run_and_inspect_say_each_warning(tmp_path, capsys):
    config = write(tmp_path, PLAIN, grown("<x>"), bos_token_id=2, eos_token_id=2)
    inputs = load_inputs(config, training=True)
    assert len(inputs.warnings) == 3
    console.describe_data(inputs)
    said = [f"warning: {line}" for line in inputs.warnings]
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")] == said
    (tmp_path / "recipe.py").write_text("from dpo_jax.config import base as get_config\n")
    fields = (f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'train.jsonl'}", "train.batch_pairs=4")
    options = (f"--config={tmp_path / 'recipe.py'}", *(f"--config.{field}" for field in fields))
    cli.main(["dpo-jax", "inspect", *options, f"--workdir={tmp_path / 'run'}"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == said


# Templates


def test_chat_without_a_template_is_refused_before_any_program_is_made(tmp_path, monkeypatch):
    config = write(tmp_path, CHAT, make_tokenizer())
    monkeypatch.setattr(train, "make_programs", lambda *_, **__: pytest.fail("touched a device"))
    with pytest.raises(InputError, match=r"train\.jsonl:1: chat messages, and a tokenizer without a chat template"):
        train.run(config, tmp_path / "run")


def test_named_templates_are_read_and_exported_along(tmp_path):
    config = write(tmp_path, CHAT, make_tokenizer(template={"default": CHATML, "tools": THINKING}))
    files = folders.tokenizer_files(tmp_path / "model")
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= {*files}
    checkpoints.export(trees.nest(load(tmp_path / "model")), base=tmp_path / "model", out=tmp_path / "out")
    loaded, exported = (tokenize.load_tokenizer(str(tmp_path / name)) for name in ("model", "out"))
    assert loaded.chat_template == {"default": CHATML, "tools": THINKING} == exported.chat_template
    found = load_inputs(config, training=True).sets["train"]
    assert found is not None and str(loaded.decode(found[0].prompt)).endswith("<|im_start|>assistant\n")


def test_model_without_a_tokenizer_is_refused(tmp_path):
    """transformers makes an empty tokenizer of the model's type, in which no text has a token."""
    config = write(tmp_path, PLAIN, make_tokenizer())
    for name in folders.tokenizer_files(tmp_path / "model"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(InputError, match="model: no tokenizer files; .*give --config.tokenizer.path=FOLDER"):
        load_inputs(config, training=True)
