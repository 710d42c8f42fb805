"""A hand-written training step in flax nnx that uses only a loss function of dpo_jax.

    python -m examples.nnx_step

A prompt is "up" or "down". The chosen answer is a few digits in that order, and the rejected answer is the same digits
in the opposite order. A small recurrent model scores both answers, and the IPO loss compares them. The accuracy is the
share of held-out pairs whose chosen answer is the more likely one. It takes a few seconds on a CPU.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo_jax.losses import make_loss

UP, DOWN, END, VOCABULARY = 10, 11, 12, 13  # the tokens after the ten digits, and how many tokens there are
WIDTH, LENGTH, BATCH, EPOCHS = 32, 7, 50, 6

loss_fn = make_loss("ipo", {"beta": 0.5})  # or dpo_jax.losses.ipo, which takes beta at each call


class Pairs(NamedTuple):
    """Two sequences per pair, chosen and rejected, padded at the end."""

    tokens: Int[Any, "P 2 S"]
    lengths: Int[Any, "P 2"]  # tokens of each answer, which begins after one prompt token


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.cells = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Int[Array, "N S"]) -> Float[Array, "N S V"]:
        states: Any = self.cells(self.embed(tokens))  # Any: nnx.RNN can return the last carry as well
        return self.head(states)


def make_pairs() -> tuple[Pairs, Pairs]:
    """Returns training pairs, and held-out pairs with other digits or the other order."""
    digits = [chosen for size in (3, 4, 5) for chosen in itertools.combinations(range(10), size)]
    prompts = [(order, chosen) for order in (UP, DOWN) for chosen in digits]
    random.Random(0).shuffle(prompts)
    tokens, lengths = np.full((len(prompts), 2, LENGTH), END), np.zeros((len(prompts), 2), int)
    for i, (order, chosen) in enumerate(prompts):
        answers = (chosen, chosen[::-1]) if order == UP else (chosen[::-1], chosen)
        for side, answer in enumerate(answers):
            tokens[i, side, : len(answer) + 1] = order, *answer
            lengths[i, side] = len(answer) + 1  # with END
    split = len(prompts) - 264
    return Pairs(tokens[:split], lengths[:split]), Pairs(tokens[split:], lengths[split:])


def logps(model: Model, pairs: Pairs) -> Float[Array, "P 2"]:
    """Log-probs summed over the tokens of each answer, in nats."""
    flat = pairs.tokens.reshape(-1, LENGTH)
    each = jax.nn.log_softmax(model(flat[:, :-1]))
    picked = jnp.take_along_axis(each, flat[:, 1:, None], axis=-1)[..., 0]
    scored = jnp.arange(LENGTH - 1)[None] < pairs.lengths.reshape(-1, 1)
    return jnp.where(scored, picked, 0).sum(1).reshape(-1, 2)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, pairs: Pairs, reference: Float[Array, "P 2"]) -> Float[Array, ""]:
    """Makes one update; returns the mean loss before it."""

    def mean_loss(model: Model) -> Float[Array, ""]:
        return loss_fn(logps(model, pairs), reference, lengths=pairs.lengths).mean()

    loss, grads = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, grads)
    return loss


def accuracy(model: Model, pairs: Pairs) -> float:
    """Share of pairs whose chosen answer is more likely than the rejected one."""
    scores = nnx.jit(logps)(model, pairs)
    return float((scores[:, 0] > scores[:, 1]).mean())


def main() -> tuple[list[float], float, float]:
    """Trains and prints; returns the mean loss of each epoch, and the accuracy before and after."""
    train, held_out = make_pairs()
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    # The reference is the initial model. Its log-probs never change, so they are computed once.
    reference = nnx.jit(logps)(model, train)
    before = accuracy(model, held_out)
    order, epochs = np.random.default_rng(0), []
    for epoch in range(EPOCHS):
        losses = []
        for chosen in np.split(order.permutation(len(train.lengths)), len(train.lengths) // BATCH):
            losses.append(step(model, optimizer, jax.tree.map(lambda x, at=chosen: x[at], train), reference[chosen]))
        epochs.append(float(jnp.stack(losses).mean()))
        print(f"epoch {epoch + 1}: loss {epochs[-1]:.4f}")
    after = accuracy(model, held_out)
    print(f"{len(held_out.lengths)} pairs never trained on: accuracy {before:.3f} before, {after:.3f} after")
    return epochs, before, after


if __name__ == "__main__":
    main()
