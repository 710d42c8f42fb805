"""The pairs, tokenizer and folder that the quickstart makes for itself."""

import itertools
import json
import re
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from dpo_jax import flags
from dpo_jax.demo import quickstart
from dpo_jax.hf import checkpoints
from dpo_jax.models import decoder
from dpo_jax.types import InputError


def draw(seed, count, *, held_out=False):
    return list(itertools.islice(quickstart.preferences(seed, held_out=held_out), count))


@pytest.fixture(scope="module")
def train():
    return draw(quickstart.SEED, quickstart.TRAIN_PAIRS)


@pytest.fixture(scope="module")
def held_out():
    return draw(quickstart.SEED, quickstart.EVAL_PAIRS, held_out=True)


@pytest.fixture(scope="module")
def tokenizer(train):
    return quickstart.train_tokenizer(text for pair in train for text in pair[:3])


@pytest.fixture
def few(monkeypatch):
    """Files of a few lines, for tests of the folder and not of what is in it."""
    monkeypatch.setattr(quickstart, "TRAIN_PAIRS", 20)
    monkeypatch.setattr(quickstart, "EVAL_PAIRS", 5)


def combination(prompt):
    """The thing and the request in a prompt, which has one of each."""
    words = set(re.findall("[a-z]+", prompt.lower()))
    (thing,), (request,) = words & set(quickstart.THINGS), words & set(quickstart.REQUESTS)
    return thing, request


def stamps(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" For your blue kettle, ask for the refund on your order page. Thank you for asking us.", 5),
        (" For your blue kettle, ask for the refund on your order page. This is the shop desk.", 4),
        (" The weather is odd here. For your blue kettle, ask for the refund on your order page.", 3),
        (" For your blue kettle, ask for the refund on your order page. Only a fool would ask that.", 2),
        (" For your red kettle, ask for the refund on your order page. Thank you for asking us.", 3),
        (" For your blue lamp, ask for the refund on your order page. Thank you for asking us.", 3),
        (" For your blue kettle or lamp, ask for the refund on your order page. Thank you.", 3),
        (" For your blue kettle, you can read the manual on our site. Thank you for asking us.", 3),
        (" For your blue kettle, read of the refund in the manual. Thank you for asking us.", 3),
        (" You are a fool, my cousin likes football.", -3),
        ("", 0),
    ],
)
def test_reward_is_the_documented_sum(answer, expected):
    prompt = "Customer: Hello, I bought a blue kettle last week. How do I get a refund?\nDesk:"
    assert quickstart.reward(prompt, answer) == expected


def test_reward_gives_nothing_where_neither_text_names_an_article_or_a_request():
    assert quickstart.reward("Customer: Hello.", " We are glad.") == 1


def test_reward_words_stand_only_where_they_mean_something():
    def words(texts):
        return set(re.findall("[a-z]+", " ".join(texts).lower()))

    telling = quickstart.ARTICLE_WORDS | quickstart.REQUEST_WORDS
    remarks = quickstart.REMARKS
    around = [*quickstart.GREETINGS, *quickstart.STORIES, *quickstart.ANSWERS, *itertools.chain(*remarks.values())]
    assert not words(around) & telling
    for request, (questions, steps) in quickstart.REQUESTS.items():
        assert all(words([text]) & telling == {request} for text in (*questions, *steps))
        assert not words(steps) & (quickstart.COURTEOUS_WORDS | quickstart.RAMBLING_WORDS | quickstart.RUDE_WORDS)
    values = {"courteous": 1, "plain": 0, "rambling": -1, "rude": -2}
    assert {kind: {quickstart.reward("", text) for text in texts} for kind, texts in remarks.items()} == {
        kind: {value} for kind, value in values.items()
    }


def test_pairs_are_a_function_of_the_seed_alone():
    assert draw(3, 200) == draw(3, 200) != draw(4, 200)


def test_pairs_are_the_same_on_every_platform():
    assert draw(0, 1) == [
        quickstart.Preference(
            prompt="Customer: Hi there, we got a white radio as a gift. I want to exchange it.\nDesk:",
            chosen=" With the white radio, any of our shops can exchange it for you. I would rather watch football.",
            rejected=" About the red guitar: your warranty card is inside the box. We have no time for nonsense.",
            chosen_reward=3,
            rejected_reward=-2,
        )
    ]


def test_pairs_have_the_better_answer_chosen(train, held_out):
    for pair in (*train, *held_out):
        assert pair.chosen_reward == quickstart.reward(pair.prompt, pair.chosen)
        assert pair.rejected_reward == quickstart.reward(pair.prompt, pair.rejected)
        assert pair.chosen_reward - pair.rejected_reward >= quickstart.MIN_GAP


def test_pairs_have_distinct_prompts(train, held_out):
    prompts = [pair.prompt for pair in (*train, *held_out)]
    assert len(set(prompts)) == len(prompts) == quickstart.TRAIN_PAIRS + quickstart.EVAL_PAIRS


def test_held_out_pairs_ask_what_training_never_asked(train, held_out):
    seen, unseen = ({combination(pair.prompt) for pair in pairs} for pairs in (train, held_out))
    assert not seen & unseen
    assert len(seen | unseen) == len(quickstart.THINGS) * len(quickstart.REQUESTS)
    # Nothing in them is new but the combination, or no accuracy could be asked for.
    assert {thing for thing, _ in unseen} <= {thing for thing, _ in seen}
    assert {request for _, request in unseen} <= {request for _, request in seen}


def test_pairs_are_readable_text(train):
    for pair in train:
        assert re.fullmatch(r"Customer: [A-Z][a-z ]+, [A-Za-z ]+\. [A-Z][A-Za-z ]+[.?]\nDesk:", pair.prompt)
        for answer in (pair.chosen, pair.rejected):
            assert re.fullmatch(r"( [A-Z][A-Za-z ,:]+\.){2}", answer)
            assert "  " not in answer


def test_held_out_pairs_are_drawn_on_their_own(train, held_out):
    # From one stream of random numbers the two sides would have the same answers, one after another.
    repeated = {(pair.chosen, pair.rejected) for pair in train} & {(pair.chosen, pair.rejected) for pair in held_out}
    assert not repeated


def test_pairs_come_from_more_than_100_000_texts():
    q = quickstart
    questions = sum(len(questions) for questions, _ in q.REQUESTS.values())
    prompts = len(q.GREETINGS) * len(q.STORIES) * len(q.COLORS) * len(q.THINGS) * questions
    assert prompts > 100_000
    # And they are drawn evenly: 5,000 draws from N texts, N >> 5,000, hold about 5,000 - 5,000^2 / 2N different ones.
    assert len({pair.chosen for pair in draw(1, 5_000)}) > 4_000


def test_length_does_not_tell_the_better_answer(train, tokenizer):
    for length in (len, lambda text: len(tokenizer(text)["input_ids"])):
        chosen, rejected = ([length(pair[side]) for pair in train] for side in (1, 2))
        assert statistics.mean(chosen) == pytest.approx(statistics.mean(rejected), rel=0.02)
        assert statistics.stdev(chosen) == pytest.approx(statistics.stdev(rejected), rel=0.1)
        longer = [a > b for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert 0.4 < statistics.mean(longer) < 0.6


def test_the_better_answer_cannot_be_told_without_the_prompt(train):
    def blind(pair, rejected):
        return quickstart.reward("", pair.chosen) - quickstart.reward("", rejected)

    guesses = [0.5 * (1 + np.sign(blind(pair, pair.rejected))) for pair in train]
    assert 0.6 < statistics.mean(guesses) < 0.9


def test_tokenizer_gives_back_any_text(train, tokenizer):
    for text in [text for pair in train[:200] for text in pair[:3]] + ["Grüße, 你好 \t\n 3.14  <b>", ""]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < quickstart.VOCAB_SIZE for token in ids)


def test_tokenizer_adds_nothing_and_ends_with_eos(tokenizer):
    assert tokenizer.eos_token == quickstart.EOS and tokenizer.eos_token_id == 0
    assert tokenizer.bos_token is None
    assert 0 not in tokenizer("How do I get a refund?")["input_ids"]
    assert 500 < len(tokenizer) <= quickstart.VOCAB_SIZE
    assert max(tokenizer.get_vocab().values()) < quickstart.VOCAB_SIZE


def test_tokenizer_never_merges_across_prompt_and_answer(train, tokenizer):
    for pair in train[:200]:
        prompt = tokenizer(pair.prompt)["input_ids"]
        assert tokenizer(pair.prompt + pair.chosen)["input_ids"] == prompt + tokenizer(pair.chosen)["input_ids"]


def test_tokens_are_as_many_as_the_recipe_says(train, held_out, tokenizer):
    recipe = flags.load("configs/quickstart.py")
    lengths = np.array([[len(ids) for ids in tokenizer(list(pair[:3]))["input_ids"]] for pair in (*train, *held_out)])
    prompts, answers = lengths[:, 0], lengths[:, 1:] + 1  # with EOS
    assert 10 <= prompts.min() and prompts.max() <= recipe.data.max_prompt_length
    assert 10 <= answers.min() and (prompts + answers.max(1)).max() <= recipe.data.max_length
    assert recipe.data.row_length and 2 * (prompts + answers.sum(1)).max() <= recipe.data.row_length


def test_tokenizer_is_a_function_of_its_texts(train, tokenizer):
    again = quickstart.train_tokenizer(text for pair in train for text in pair[:3])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_prepare_writes_what_the_recipe_names(few, tmp_path):
    quickstart.prepare(tmp_path)
    recipe = flags.load("configs/quickstart.py")
    inputs = tmp_path / "inputs"
    assert sorted(path.relative_to(inputs).as_posix() for path in inputs.rglob("*.*")) == sorted(quickstart.FILES)
    named = [recipe.data.train, recipe.data.eval, recipe.model.path]
    assert [name.format(workdir=tmp_path) for name in named] == [
        str(inputs / name) for name in ("train.jsonl", "eval.jsonl", "model")
    ]
    lines = (inputs / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [pair._asdict() for pair in draw(quickstart.SEED, 20)]
    lines = (inputs / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [pair._asdict() for pair in draw(quickstart.SEED, 5, held_out=True)]


def test_prepare_writes_a_model_and_its_tokenizer(few, tmp_path):
    quickstart.prepare(tmp_path)
    folder = tmp_path / "inputs" / "model"
    shape, hf = checkpoints.read_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not shape.tie_embeddings and shape.vocab_size == quickstart.VOCAB_SIZE >= len(tokenizer)
    assert hf["eos_token_id"] == tokenizer.eos_token_id == 0
    params = checkpoints.load_params(folder, shape)
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.std() == pytest.approx(quickstart.INIT_STD, rel=0.01) and abs(kernel.mean()) < 1e-3
    assert (params["blocks"]["attention_norm"]["scale"] == 1).all() and (params["final_norm"]["scale"] == 1).all()
    tokens = jnp.arange(4)[None]
    hidden = decoder.forward(params, shape, tokens, tokens, 0 * tokens, tokens + 1)
    assert jnp.isfinite(hidden).all()


def test_prepare_makes_the_same_files_each_time(few, tmp_path):
    for name in ("first", "second"):
        quickstart.prepare(tmp_path / name)
    for name in quickstart.FILES:
        first, second = ((tmp_path / run / "inputs" / name).read_bytes() for run in ("first", "second"))
        assert first == second, name


def test_prepare_leaves_complete_inputs_alone(few, tmp_path):
    quickstart.prepare(tmp_path)
    before = stamps(tmp_path)
    quickstart.prepare(tmp_path)
    assert stamps(tmp_path) == before


def test_prepare_starts_over_where_it_was_stopped(few, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, out, **kwargs):
        assert (out.parent / "train.jsonl").exists(), "it is to be stopped midway"
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(quickstart.checkpoints, "save_new", die)
        quickstart.prepare(tmp_path)
    assert not list(tmp_path.iterdir())
    quickstart.prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs"]
    assert all((tmp_path / "inputs" / name).is_file() for name in quickstart.FILES)


def test_prepare_refuses_a_folder_that_is_not_whole(tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "train.jsonl").write_text("mine")
    with pytest.raises(InputError, match="lacks eval.jsonl, model/config.json"):
        quickstart.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == ["train.jsonl"]
    assert (tmp_path / "inputs" / "train.jsonl").read_text() == "mine"
