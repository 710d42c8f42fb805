"""Generates the inputs of `configs/quickstart.py`: preferences with a known reward, a tokenizer, a small model.

The preferences are messages to the help desk of a shop, each with two answers. `reward` is the true quality of an
answer, so a run can be judged by it and not by its loss alone:

    prompt     Customer: Hello, I bought a blue kettle last week. How do I get a refund?\\nDesk:
    chosen      Thank you for asking us. For your blue kettle, the refund reaches your card in five days.
    rejected    For your red lamp, the refund reaches your card in five days. It is your own fault anyway.

Every answer has the same parts (a sentence that answers and a remark, in either order), drawn from lists whose
entries are equally long, so that length does not reveal the better answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax import trees
from dpo_jax.hf import checkpoints
from dpo_jax.hf.families import family
from dpo_jax.hf.tensors import leaf_shapes
from dpo_jax.runtime import files
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError

SEED = 0
TRAIN_PAIRS, EVAL_PAIRS = 3200, 400
MIN_GAP = 2  # least difference in reward between the answers of a pair
VOCAB_SIZE = 1024  # of the model; the tokenizer stops sooner, once every word of the text is a token
EOS = "<|endoftext|>"
MODEL = {  # the config.json of the model, without the id of EOS
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Large models start at 0.02. This is near 1 / sqrt(width). With it the model learns within 100 updates to copy words
# from the prompt, as this task demands. From 0.02 it still does not copy colors after 200.
INIT_STD = 0.06
# The files that `prepare` writes to WORKDIR/inputs.
FILES = (
    "train.jsonl",
    "eval.jsonl",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
)

LAST = max(FILES)  # written last; in a bucket the folder counts from then on

COLORS = "black blue brown green grey red white yellow".split()
THINGS = "backpack bike blanket camera chair clock guitar jacket kettle lamp radio tent".split()
GREETINGS = ("Hello,", "Hi there,", "Good morning,", "Good evening,", "Dear team,", "Excuse me,")
STORIES = (
    "I bought a {article} last week.",
    "my {article} came on Monday.",
    "I ordered a {article} from your site.",
    "we got a {article} as a gift.",
    "there is a crack in my {article}.",
    "this is about the {article} in my last order.",
    "a {article} was left at my door.",
    "my mother bought a {article} here.",
)
# Each request is known by one word, which stands in every question about it and in every answer to it.
REQUESTS = {
    "delivery": (
        ("When is the delivery?", "Can I change the delivery day?", "How much is delivery?", "Is delivery free?"),
        ("the delivery comes on Friday before noon", "pick a new delivery day on your order page",
         "we do not charge for delivery in town"),
    ),
    "exchange": (
        ("Can I exchange it?", "How does an exchange work?", "I want to exchange it.", "Do you exchange gifts?"),
        ("any of our shops can exchange it for you", "open the exchange page and choose a new size",
         "we exchange it if the box is unopened"),
    ),
    "invoice": (
        ("Where is my invoice?", "Please send the invoice again.", "The invoice is wrong.", "I need an invoice."),
        ("the invoice is in your account under orders", "we have sent the invoice to you by mail",
         "you can change the invoice on your order page"),
    ),
    "manual": (
        ("Where is the manual?", "There was no manual in the box.", "I lost the manual.", "Have you got a manual?"),
        ("the manual is at the bottom of the box", "you can read the manual on our site",
         "we will post you a new manual tomorrow"),
    ),
    "refund": (
        ("How do I get a refund?", "When does my refund arrive?", "Is a refund possible?", "I want a refund."),
        ("the refund reaches your card in five days", "ask for the refund on your order page",
         "we send the refund when the box is here"),
    ),
    "repair": (
        ("Who can repair it?", "What does a repair cost?", "How long does a repair take?", "Can you repair it?"),
        ("a repair takes two weeks in our workshop", "book the repair on our site or in town",
         "we do the first repair free of charge"),
    ),
    "return": (
        ("How do I return it?", "Can I return it this month?", "I would like to return it.", "May I return it?"),
        ("print the return label and post the box", "fill in the return form on our site",
         "you can return it to any of our shops"),
    ),
    "warranty": (
        ("How long is the warranty?", "Is this under warranty?", "What is the warranty?", "Is there a warranty?"),
        ("the warranty lasts two years from today", "the warranty covers every part of it",
         "your warranty card is inside the box"),
    ),
}  # fmt: skip
ANSWERS = ("For your {article}, {step}.", "With the {article}, {step}.", "About the {article}: {step}.")
REMARKS = {
    "courteous": (
        "Thank you for asking us.", "Thank you for your message today.", "We are glad to be of help.",
        "We are glad that you asked us.", "We are sorry for the trouble.", "We are sorry about the long wait.",
        "Please write again at any time.", "Please tell us how it goes.",
    ),
    "plain": (
        "This is the shop desk.", "This is our answer to you.", "We have read your message today.",
        "We have your order on file.", "Our desk is open until six.", "Our office is on Main Street.",
        "Your number in line was nine.", "Your message came in this morning.",
    ),
    "rambling": (
        "The weather is odd here.", "Such weather makes me think of home.", "My cousin used to have one.",
        "My cousin lives by the sea.", "There was soup for lunch today.", "I never liked soup that much.",
        "The football was on last night.", "I would rather watch football.",
    ),
    "rude": (
        "Only a fool would ask that.", "Any fool could work this out.", "We have no time for nonsense.",
        "We get this nonsense every day.", "Stop whining about it to us.", "All this whining makes us tired.",
        "It is your own fault anyway.", "Most of it is your fault.",
    ),
}  # fmt: skip
# The words by which `reward` tells an article, a request and the kinds of remark; a plain remark has none of them.
ARTICLE_WORDS = frozenset([*COLORS, *THINGS])
REQUEST_WORDS = frozenset(REQUESTS)
COURTEOUS_WORDS = frozenset({"thank", "glad", "sorry", "please"})
RAMBLING_WORDS = frozenset({"weather", "cousin", "soup", "football"})
RUDE_WORDS = frozenset({"fool", "nonsense", "whining", "fault"})

_T = TypeVar("_T")


class Preference(NamedTuple):
    """One line of the files: prompt and answers, and the true rewards, which training does not read."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: int
    rejected_reward: int


def reward(prompt: str, answer: str) -> int:
    """Returns the true quality of an answer, from its words alone, so a model's own answers have one too.

    2 * (names the customer's article, its color and no other) + 2 * (speaks of the request and of no other)
      + 1 * (courteous) - 1 * (rambling) - 2 * (rude)

    Returns: from -3 to 5; an answer made here has one remark, so from -2 to 5.
    """
    asked, answered = _words(prompt), _words(answer)
    names_article = bool(answered & ARTICLE_WORDS) and answered & ARTICLE_WORDS == asked & ARTICLE_WORDS
    meets_request = bool(answered & REQUEST_WORDS) and answered & REQUEST_WORDS == asked & REQUEST_WORDS
    courteous, rambling, rude = (bool(answered & words) for words in (COURTEOUS_WORDS, RAMBLING_WORDS, RUDE_WORDS))
    return 2 * names_article + 2 * meets_request + courteous - rambling - 2 * rude


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", text.lower()))


def preferences(seed: int, *, held_out: bool) -> Iterator[Preference]:
    """Yields pairs without end; no prompt repeats, and the chosen answer's reward is higher by at least MIN_GAP.

    A tenth of the combinations of thing and request is kept for `held_out`: the two sides share no prompt, and
    held-out pairs have combinations that training never has.

    Args:
      seed: any integer; equal seeds give equal pairs on every platform.
      held_out: which side of the split to draw from.
    """
    rng = random.Random(2 * seed + held_out)  # two streams, or both sides would share their answers
    combinations = [
        (thing, request)
        for (i, thing), (j, request) in itertools.product(enumerate(THINGS), enumerate(REQUESTS))
        if ((i + 3 * j) % 10 == 0) == held_out
    ]
    seen = set()
    while True:
        thing, request = _pick(rng, combinations)
        color = _pick(rng, COLORS)
        story = _pick(rng, STORIES).format(article=f"{color} {thing}")
        prompt = f"Customer: {_pick(rng, GREETINGS)} {story} {_pick(rng, REQUESTS[request][0])}\nDesk:"
        answers = [_answer(rng, color, thing, request) for _ in range(2)]
        (low, rejected), (high, chosen) = sorted((reward(prompt, answer), answer) for answer in answers)
        if prompt not in seen and high - low >= MIN_GAP:
            seen.add(prompt)
            yield Preference(prompt, chosen, rejected, high, low)


def _answer(rng: random.Random, color: str, thing: str, request: str) -> str:
    """Draws an answer with any kind of remark; 30 % are about another article, 30 % about another request.

    It starts with a space: the prompt ends with a colon, and byte-level tokens carry the space before their word.
    """
    if rng.random() < 0.3:
        color, thing = _other(rng, COLORS, color), _other(rng, THINGS, thing)
    if rng.random() < 0.3:
        request = _other(rng, list(REQUESTS), request)
    step = _pick(rng, REQUESTS[request][1])
    answer = _pick(rng, ANSWERS).format(article=f"{color} {thing}", step=step)
    remark = _pick(rng, REMARKS[_pick(rng, list(REMARKS))])
    return f" {remark} {answer}" if rng.random() < 0.5 else f" {answer} {remark}"


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    # random() is the one method whose sequence Python promises to keep from version to version.
    return options[int(rng.random() * len(options))]


def _other(rng: random.Random, options: Sequence[str], this: str) -> str:
    return _pick(rng, [option for option in options if option != this])


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most VOCAB_SIZE tokens; EOS is id 0, and no special token is added."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        # All 256 bytes, so that any text can be encoded, not only what it was trained on.
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def initial_params(seed: int, hf_config: dict) -> dict:
    """Draws parameters for a `config.json`: matrices normal with standard deviation INIT_STD, norms 1.

    By numpy, since a run touches no device before its inputs are complete and checked.
    """
    kind = family(hf_config, "quickstart")
    config = kind.decoder_config(hf_config, "quickstart")
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return (
            np.ones(shape, np.float32) if path.endswith("scale") else INIT_STD * rng.standard_normal(shape, "float32")
        )

    shapes = leaf_shapes(kind.tensors(config), config.stacks)
    leaves = {path: draw(path, shape) for path, shape in sorted(shapes.items())}
    return trees.nest(leaves)


def prepare(workdir: Path) -> None:
    """Writes WORKDIR/inputs with all of FILES; does nothing if they exist.

    The folder appears complete or not at all.

    Raises: InputError if WORKDIR/inputs exists and lacks a file, for it may not be ours to replace.
    """
    inputs = files.path(workdir) / "inputs"
    missing = [name for name in FILES if not (inputs / name).is_file()]
    if not missing:
        return
    if files.has_folder(inputs, LAST):
        raise InputError(
            str(inputs),
            got=f"lacks {', '.join(missing)}",
            expected="all files of the quickstart, or no such folder",
            remedy="Delete it if an earlier quickstart made it, or choose another working folder.",
        )
    with (
        files.replacing_folder(inputs, keep_existing=True, last=LAST) as unfinished,
        contextlib.closing(files.Mirror(unfinished)) as mirror,  # which copies files in order of their names
    ):
        _write(mirror.local)


def _write(folder: pathlib.Path) -> None:
    train = list(itertools.islice(preferences(SEED, held_out=False), TRAIN_PAIRS))
    held_out = list(itertools.islice(preferences(SEED, held_out=True), EVAL_PAIRS))
    for name, pairs in (("train.jsonl", train), ("eval.jsonl", held_out)):
        lines = (json.dumps(pair._asdict()) + "\n" for pair in pairs)
        files.write_text(folder / name, "".join(lines))
    tokenizer = train_tokenizer(text for pair in train for text in pair[:3])
    hf_config = MODEL | {"eos_token_id": tokenizer.eos_token_id}
    checkpoints.save_new(initial_params(SEED, hf_config), hf_config=hf_config, out=folder / "model")
    tokenizer.save_pretrained(folder / "model")
