"""What a step asks of a chip's arithmetic, memory and network, counted from shapes, and the least time that takes.

Arithmetic and network traffic are counts. Memory traffic is an estimate: it takes every array of a block to be written
once and read once, which a compiler that joins operations undercuts, and one that repeats them exceeds. The least time
of a step is that of the slowest of the four, as if the others were hidden behind it and it ran at its peak
(Williams et al. 2009, the roofline model); real steps take longer.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.cost.chips import Chip
from dpo_jax.cost.flops import WHOLE, Shares, forward_flops, product_flops, tokens_of, train_flops, unmade_flops
from dpo_jax.data import packing
from dpo_jax.data.packing import Shape
from dpo_jax.models.config import DecoderConfig

DRAWN_BATCHES = 16  # that a mean update is the mean of


class Work(NamedTuple):
    """Of a mean batch, over all chips."""

    pairs: int
    microbatches: float
    positions: float  # computed, padding and empty rows included
    tokens: float  # of those, that hold something
    scored: float  # tokens that meet the vocabulary
    needed: float  # operations of one forward pass over what is real
    padding: float  # operations of one forward pass over the rest
    head: float  # of the needed ones, the vocabulary's
    training: float  # operations that an update needs, of what is real
    unmade: float  # operations of gradients, padding's too, that an update does not make


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step on one chip."""

    flops: float  # computed, padding and recomputation included
    hbm_bytes: float
    ici_seconds: float
    ici_bytes: float  # sent over ICI or NVLink
    dcn_bytes: float  # sent over the data center's network

    def plus(self, other: Cost) -> Cost:
        """Of one after the other."""
        return Cost(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time of each resource alone."""
        return {
            "compute": self.flops / chip.flops,
            "HBM": self.hbm_bytes / chip.hbm_bytes_per_s,
            "ICI" if chip.dimensions else "NVLink": self.ici_seconds,
            "DCN": self.dcn_bytes * chip.chips_per_host / chip.dcn_bytes_per_s,
        }


def mean_work(
    model: DecoderConfig,
    lengths: Int[np.ndarray, "N _"],
    shape: Shape,
    name: str,
    needed: Shares = WHOLE,
    made: Shares = WHOLE,
) -> Work:
    """The mean over batches drawn at random, packed as a run would pack them.

    Args:
      needed: what trains.
      made: what gradients are made of: whole leaves, also where some layers of them do not train.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DRAWN_BATCHES):
        drawn = lengths[rng.integers(0, len(lengths), shape.pairs)]
        microbatches = packing.plan(drawn, shape, name)
        positions = sum(each.positions for each in microbatches)
        tokens, scored = tokens_of(drawn, name)
        forward = forward_flops(model, drawn, name, needed)
        padding = product_flops(model, positions - tokens, 0, needed)
        head = product_flops(model, 0, scored)
        training = train_flops(model, drawn, name, needed)
        unmade = unmade_flops(model, positions, scored, made)
        found.append((len(microbatches), positions, tokens, scored, forward, padding, head, training, unmade))
    return Work(shape.pairs, *np.mean(found, 0).tolist())


def update_flops(work: Work, remat: str) -> float:
    """Operations that an update computes: forward, backward, and what is computed again, the head's always."""
    again = 1 if remat in ("block", "offload") else 0
    return (3 + again) * (work.needed - work.head + work.padding) + 4 * work.head - work.unmade


def block_arrays(model: DecoderConfig) -> tuple[int, int]:
    """How many numbers a block makes of a position: in arrays that `tensor` does not cut, and in those that it does."""
    m = model
    norms = 4 if m.norms == "both" else 2
    lines = 2 * m.experts_per_token  # a token for each of its experts, and what each makes of it
    heads = (3 if m.qk_norm else 2) * (m.heads + m.kv_heads) * m.head_dim  # queries and keys count twice if normalized
    return (4 + norms + lines) * m.width, heads + (3 if m.gated else 2) * m.active_width


def forward_bytes(model: DecoderConfig, work: Work, *, chips: int, tensor: int, itemsize: int) -> float:
    """Memory traffic of a chip for the activations of one forward pass."""
    whole, cut = block_arrays(model)
    blocks = model.layers * (whole * tensor + cut) * work.positions  # what `tensor` does not cut, each holds whole
    logits = work.scored * model.vocab_size
    return 2 * (itemsize * blocks + 4 * logits) / chips


def update_bytes(
    model: DecoderConfig,
    work: Work,
    *,
    chips: int,
    tensor: int,
    itemsize: int,
    remat: str,
    state: int,
    gradients: int,
    weights: float,
) -> float:
    """Memory traffic of a chip for one update.

    Args:
      state: bytes of the weights that train and of optimizer state on a chip, read and written once.
      gradients: bytes of their sums on a chip, read and written for every microbatch, and read by the optimizer.
      weights: bytes of a chip's part of the weights in the compute type with `fsdp` gathered.
    """
    again = 1 if remat in ("block", "offload") else 0
    activations = (3 + again) * forward_bytes(model, work, chips=chips, tensor=tensor, itemsize=itemsize)
    # Written when gathered and read when used: forward, backward, and forward again.
    passing = work.microbatches * 2 * (2 + again) * weights
    return activations + passing + 2 * state + (2 * work.microbatches + 2) * gradients


class Analytic(NamedTuple):
    """Network traffic of a step, bytes a chip sends, where no compiler can be asked."""

    within: float  # a host, or a slice
    across: float


def network_bytes(
    model: DecoderConfig,
    work: Work,
    *,
    sizes: dict[str, int],
    per_host: int,
    itemsize: int,
    weights: float,
    trained: float,
    backward: bool,
    remat: str = "dots",
) -> Analytic:
    """What a mesh of GPUs sends: weights gathered over `fsdp` and gradients scattered over it for every microbatch,
    gradients summed over `replica`, and the results of each block's two products summed over `tensor`.

    `tensor` lies within a host, then `fsdp`; a collective over several hosts crosses the network once for each host.

    Args:
      weights: bytes of a chip's part of the weights in the compute type with `fsdp` gathered.
      trained: of those, the bytes of what has gradients.
    """
    again = 1 if remat in ("block", "offload") else 0
    fsdp, tensor, replica = sizes["fsdp"], sizes["tensor"], sizes["replica"]
    wide = trained * 4 / itemsize
    over_fsdp = work.microbatches * (weights * (2 + again if backward else 1) + (wide if backward else 0))
    rows = work.positions / (fsdp * replica)
    over_tensor = 2 * rows * model.width * itemsize * model.layers * 2 * (2 + again if backward else 1)
    over_replica = 2 * wide / fsdp if backward else 0.0
    inside = max(1, min(fsdp, per_host // tensor))  # chips of an fsdp group that share a host
    hosts = fsdp // inside
    within = over_fsdp * (fsdp - 1) / fsdp + over_tensor * (tensor - 1) / tensor
    across = over_fsdp * (hosts - 1) / hosts / inside + over_replica * (replica - 1) / replica
    return Analytic(within, across)


def counted(
    model: DecoderConfig,
    work: Work,
    chip: Chip,
    *,
    sizes: dict[str, int],
    itemsize: int,
    update: bool,
    remat: str,
    state: int,
    gradients: int,
    weights: float,
    trained: float,
) -> Cost:
    """The cost of an update, or of scoring; arguments as those of the functions above."""
    chips, tensor = sizes["replica"] * sizes["fsdp"] * sizes["tensor"], sizes["tensor"]
    if update:
        operations = update_flops(work, remat)
        hbm = update_bytes(
            model,
            work,
            chips=chips,
            tensor=tensor,
            itemsize=itemsize,
            remat=remat,
            state=state,
            gradients=gradients,
            weights=weights,
        )
    else:
        operations = work.needed + work.padding
        hbm = forward_bytes(model, work, chips=chips, tensor=tensor, itemsize=itemsize)
        hbm += 2 * work.microbatches * weights
    net = network_bytes(
        model,
        work,
        sizes=sizes,
        per_host=chip.chips_per_host,
        itemsize=itemsize,
        weights=weights,
        trained=trained,
        backward=update,
        remat=remat,
    )
    rate = chip.links * chip.link_bytes_per_s
    return Cost(operations / chips, hbm, net.within / rate, net.within, net.across)


def activation_bytes(model: DecoderConfig, positions: float, *, tensor: int, itemsize: int, remat: str) -> float:
    """Bytes of what a chip keeps for the backward pass of `positions` and of one block at work.

    Args:
      remat: empty: there is no backward pass.
    """
    m = model
    whole, cut = block_arrays(m)
    products = (2 * m.heads + 2 * m.kv_heads) * m.head_dim + (2 if m.gated else 1) * m.active_width
    # Of experts only the products with gate and up are kept, whatever the policy keeps of the rest.
    lines, hidden = 2 * m.experts_per_token * m.width, m.active_width if m.experts else 0
    kept = {
        "": 0.0,
        "offload": 0.0,
        "block": m.width,
        "dots": (2 if m.experts else 3) * m.width + products / tensor,
        "none": whole - lines + (cut - hidden) / tensor,
    }
    at_work = whole + cut / tensor
    return itemsize * positions * (m.layers * kept[remat] + (2 if remat else 1) * at_work)


def weight_bytes(model: DecoderConfig, gathered: float, *, itemsize: int, trained: float) -> float:
    """Bytes of what a chip holds of weights besides its own: of a layer gathered, and of the next on its way.

    Args:
      gathered: bytes of a chip's part of the weights in the compute type with `fsdp` gathered.
      trained: of those, the bytes of what has gradients; 0 where there is no backward pass.
    """
    # The gradients of all experts of a layer, in float32, are there before the first of them is scattered.
    gradients = trained * 4 / itemsize if model.experts else 0
    return (2 * gathered + gradients) / model.layers
