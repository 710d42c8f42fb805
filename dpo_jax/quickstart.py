"""Inputs made on the spot for `configs/quickstart.py`: preferences with a known reward, a tokenizer, a small model.

The preferences are messages to a shop's help desk, each with two answers. What makes an answer good is written down in
`reward`, so a run can be judged by the truth and not only by its loss:

    prompt     Customer: Hello, I bought a blue kettle last week. How do I get a refund?\\nDesk:
    chosen      Thank you for asking us. For your blue kettle, the refund reaches your card in five days.
    rejected    For your red ladder, the refund reaches your card in five days. Nobody has time for such nonsense.

Both answers of a pair have the same make-up (a sentence with the answer and a remark, in either order), drawn from
lists of equal length, so that length says nothing about which is better.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")

SEED = 0
TRAIN_PAIRS, EVAL_PAIRS = 4000, 400
MIN_GAP = 2.0  # least difference in reward between the answers of a pair
VOCAB_SIZE = 1024
EOS = "<|endoftext|>"

COLOURS = "black blue brown green grey red white yellow".split()
THINGS = (
    "backpack bench bike blanket blender camera chair clock curtain drill fan freezer grill guitar heater helmet "
    "jacket kettle keyboard ladder lamp mattress mirror monitor phone pillow printer radio rug scooter shelf sofa "
    "speaker stroller suitcase table tablet tent toaster vacuum"
).split()
GREETINGS = ("Hello,", "Hi there,", "Good morning,", "Good evening,", "Dear team,")
STORIES = (
    "I bought a {thing} last week.",
    "my {thing} came on Monday.",
    "I ordered a {thing} from your site.",
    "we got a {thing} as a gift.",
    "there is a crack in my {thing}.",
    "this is about the {thing} in my last order.",
)
# Each request is known by one word, which stands in every question about it and in every answer to it.
REQUESTS = {
    "delivery": (
        ("When is the delivery?", "Can I change the delivery day?", "How much is delivery?"),
        ("the delivery comes on Friday before noon", "pick a new delivery day on your order page",
         "we do not charge for delivery in town"),
    ),
    "exchange": (
        ("Can I exchange it?", "How does an exchange work?", "I want to exchange it for a larger one."),
        ("any of our shops can exchange it for you", "open the exchange page and choose a new size",
         "we exchange it if the box is unopened"),
    ),
    "invoice": (
        ("Where is my invoice?", "Can you send the invoice again?", "The name on the invoice is wrong."),
        ("the invoice is in your account under orders", "we have sent the invoice to you by mail",
         "you can change the invoice on your order page"),
    ),
    "manual": (
        ("Where can I find the manual?", "There was no manual in the box.", "Is there a manual in French?"),
        ("the manual is at the bottom of the box", "you can read the manual on our site",
         "we will post you a new manual tomorrow"),
    ),
    "refund": (
        ("How do I get a refund?", "When does my refund arrive?", "Is a refund still possible?"),
        ("the refund reaches your card in five days", "ask for the refund on your order page",
         "we send the refund when the box is here"),
    ),
    "repair": (
        ("Who can repair it?", "What does a repair cost?", "How long does a repair take?"),
        ("a repair takes two weeks in our workshop", "book the repair on our site or in town",
         "we do the first repair free of charge"),
    ),
    "return": (
        ("How do I return it?", "Can I return it this month?", "I would like to return it."),
        ("print the return label and post the box", "fill in the return form on our site",
         "you can return it to any of our shops"),
    ),
    "warranty": (
        ("How long is the warranty?", "Is this under warranty?", "Does the warranty cover it?"),
        ("the warranty lasts two years from today", "the warranty covers every part of it",
         "your warranty card is inside the box"),
    ),
}  # fmt: skip
ANSWERS = ("For your {thing}, {step}.", "With the {thing}, {step}.", "About the {thing}: {step}.")
# The words by which `reward` knows a remark, and the remarks; plain ones count for nothing.
COURTEOUS = frozenset({"thank", "glad", "sorry", "please"})
RUDE = frozenset({"fool", "nonsense", "whining", "fault"})
RAMBLING = frozenset({"weather", "cousin", "soup", "football"})
REMARKS = {
    "courteous": (
        "Thank you for asking us.", "Thank you for your message today.", "We are glad to be of help.",
        "We are glad that you asked.", "We are sorry for the trouble.", "We are sorry about the wait.",
        "Please write again at any time.", "Please tell us how it goes.",
    ),
    "plain": (
        "This is the shop desk.", "This is our answer to you.", "We have read your message today.",
        "We have your order on file.", "Our desk is open until six.", "Our office is on Main Street.",
        "Your number in line was nine.", "Your message came in this morning.",
    ),
    "rambling": (
        "The weather has been odd here.", "Such weather makes me think of home.", "My cousin used to have one.",
        "My cousin lives by the sea.", "There was soup for lunch today.", "I never liked soup that much.",
        "The football was on last night.", "I would rather be playing football.",
    ),
    "rude": (
        "Only a fool would ask that.", "Any fool could work this out.", "Nobody has time for such nonsense.",
        "We get this nonsense every day.", "Stop whining about it to us.", "All this whining makes us tired.",
        "It is your own fault anyway.", "Most of this is your fault.",
    ),
}  # fmt: skip


class Preference(NamedTuple):
    """One line of the files written: the reader's three columns, and the truth for whoever wants to check."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


def reward(prompt: str, answer: str) -> float:
    """How good an answer is, told from the words in it.

    2 * (names the customer's thing and no other) + 2 * (speaks of the request made and no other)
      + 1 * (courteous) - 1 * (rambling) - 2 * (rude)

    Any text has a reward, so what a model generates can be scored too.

    Returns: a whole number from -3 to 5; answers made here have no two kinds of remark and lie from -2 to 5.
    """
    asked, said = _words(prompt), _words(answer)
    names_thing = bool(said & _THINGS) and said & _THINGS == asked & _THINGS
    meets_request = bool(said & _REQUESTS) and said & _REQUESTS == asked & _REQUESTS
    return float(
        2 * names_thing
        + 2 * meets_request
        + bool(said & COURTEOUS)
        - bool(said & RAMBLING)
        - 2 * bool(said & RUDE)
    )


_THINGS, _REQUESTS = frozenset(THINGS), frozenset(REQUESTS)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", text.lower()))


def preferences(seed: int, *, held_out: bool) -> Iterator[Preference]:
    """Yields pairs without end, no prompt twice; the one with the higher reward is chosen.

    A tenth of the (thing, request) combinations is kept for `held_out`, so the two streams share no prompt, and
    held-out pairs ask for what training never asked for.

    Args:
      seed: any integer; equal seeds give equal streams on every platform.
      held_out: which side of the split to draw from.
    """
    rng = random.Random(seed)
    combinations = [
        (thing, request)
        for (i, thing), (j, request) in itertools.product(enumerate(THINGS), enumerate(REQUESTS))
        if ((i + 3 * j) % 10 == 0) == held_out
    ]
    seen = set()
    while True:
        thing, request = _pick(rng, combinations)
        coloured = f"{_pick(rng, COLOURS)} {thing}"
        prompt = _prompt(rng, coloured, request)
        first, second = _answer(rng, coloured, request), _answer(rng, coloured, request)
        first_reward, second_reward = reward(prompt, first), reward(prompt, second)
        if prompt in seen or abs(first_reward - second_reward) < MIN_GAP:
            continue
        seen.add(prompt)
        if first_reward > second_reward:
            yield Preference(prompt, first, second, first_reward, second_reward)
        else:
            yield Preference(prompt, second, first, second_reward, first_reward)


def _prompt(rng: random.Random, thing: str, request: str) -> str:
    story = _pick(rng, STORIES).format(thing=thing)
    return f"Customer: {_pick(rng, GREETINGS)} {story} {_pick(rng, REQUESTS[request][0])}\nDesk:"


def _answer(rng: random.Random, thing: str, request: str) -> str:
    """One answer, starting with a space: wrong about the thing or the request 2 times in 5 each, any kind of remark."""
    if rng.random() < 0.4:
        thing = f"{_pick(rng, COLOURS)} {_pick(rng, [other for other in THINGS if other not in thing.split()])}"
    if rng.random() < 0.4:
        request = _pick(rng, [other for other in REQUESTS if other != request])
    body = _pick(rng, ANSWERS).format(thing=thing, step=_pick(rng, REQUESTS[request][1]))
    remark = _pick(rng, REMARKS[_pick(rng, list(REMARKS))])
    return f" {remark} {body}" if rng.random() < 0.5 else f" {body} {remark}"


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    # random() is the one method whose sequence Python promises to keep from version to version.
    return options[int(rng.random() * len(options))]
