"""Least time of a step by the roofline model: arithmetic, memory and network traffic, counted from shapes.

Arithmetic and network traffic are counts. Memory traffic is an estimate: every array of a block is assumed to be
written once and read once, while a compiler that fuses operations needs less, and one that recomputes needs more. The
least time of a step is that of the slowest resource, as if the others were hidden behind it and it ran at its peak
(Williams et al. 2009, the roofline model). Real steps take longer.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.cost.chips import Chip
from dpo_jax.cost.flops import WHOLE, Shares, forward_flops, frozen_flops, product_flops, tokens_of, train_flops
from dpo_jax.data import packing
from dpo_jax.data.packing import Shape
from dpo_jax.models.config import DecoderConfig

DRAWN_BATCHES = 16  # number of random batches that the mean batch is taken over


class Work(NamedTuple):
    """Work of a mean batch, on all chips together."""

    pairs: int
    microbatches: float
    positions: float  # computed, padding and empty rows included
    tokens: float  # positions that hold a token
    scored: float  # tokens that are multiplied by the vocabulary matrix
    needed: float  # operations of one forward pass over tokens
    padding: float  # operations of one forward pass over all other positions
    head: float  # the part of `needed` that is the vocabulary's
    training: float  # operations that an update needs, without padding
    frozen: float  # operations of gradients that an update does without, with padding


class Execution(NamedTuple):
    """Mesh, compute type and rematerialization of a step."""

    sizes: Mapping[str, int]  # of the mesh axes, by name
    itemsize: int  # bytes of a number in the compute type
    remat: str = "dots"  # see `config.Model.remat`

    @property
    def chips(self) -> int:
        """Number of chips of the mesh."""
        return self.sizes["replica"] * self.sizes["fsdp"] * self.sizes["tensor"]


class ChipBytes(NamedTuple):
    """Bytes of one chip's parts of weights, gradients and optimizer state."""

    weights: float  # of all weights, in the compute type, with `fsdp` gathered
    trained: float  # the part of `weights` that has gradients
    state: int = 0  # trained weights and optimizer state, as stored
    gradients: int = 0  # gradient sums, as stored


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and traffic of one step on one chip."""

    flops: float  # computed, padding and recomputation included
    hbm_bytes: float
    ici_seconds: float
    ici_bytes: float  # sent over ICI or NVLink
    dcn_bytes: float  # sent over the data center's network

    def plus(self, other: Cost) -> Cost:
        """Adds the cost of another step, run after this one."""
        return Cost(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Returns the least time of each resource alone."""
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
    trained: Shares = WHOLE,
    differentiated: Shares = WHOLE,
) -> Work:
    """Computes the mean work of batches drawn at random and packed as in a run.

    Args:
      lengths: token counts of the prompt and the answers of every pair.
      trained: shares that train.
      differentiated: shares whose gradients are computed: whole leaves, also where only some layers of them train.
    """
    rng = np.random.default_rng(0)
    batches, layout = [], shape.layout
    for _ in range(DRAWN_BATCHES):
        drawn = lengths[rng.integers(0, len(lengths), shape.pairs)]
        microbatches = packing.plan(drawn, shape)
        positions = sum(each.positions for each in microbatches)
        tokens, scored = tokens_of(drawn, layout)
        forward = forward_flops(model, drawn, layout, trained)
        padding = product_flops(model, positions - tokens, 0, trained)
        head = product_flops(model, 0, scored)
        training = train_flops(model, drawn, layout, trained)
        frozen = frozen_flops(model, positions, scored, differentiated)
        batches.append((len(microbatches), positions, tokens, scored, forward, padding, head, training, frozen))
    return Work(shape.pairs, *np.mean(batches, 0).tolist())


def _recomputed_forwards(remat: str) -> int:
    return 1 if remat in ("block", "offload") else 0


def update_flops(work: Work, remat: str) -> float:
    """Operations that an update computes: forward, backward and recomputation, which always includes the head's."""
    again = _recomputed_forwards(remat)
    return (3 + again) * (work.needed - work.head + work.padding) + 4 * work.head - work.frozen


def block_arrays(model: DecoderConfig) -> tuple[int, int]:
    """Counts the numbers that a block computes for one position: (in arrays replicated over `tensor`, sharded over it).

    Includes inputs and outputs of products, norms and sums.
    """
    m = model
    norms = 4 if m.norms == "both" else 2
    lines = 2 * m.experts_per_token  # input and output of each of a token's experts
    heads = (3 if m.qk_norm else 2) * (m.heads + m.kv_heads) * m.head_dim  # queries and keys count twice if normalized
    return (4 + norms + lines) * m.width, heads + (3 if m.gated else 2) * m.active_width


def forward_bytes(model: DecoderConfig, work: Work, *, chips: int, tensor: int, itemsize: int) -> float:
    """Memory traffic of a chip for the activations of one forward pass, in bytes.

    Args:
      tensor: size of the mesh axis of that name.
      itemsize: bytes of a number in the compute type.
    """
    replicated, sharded = block_arrays(model)
    blocks = model.layers * (replicated * tensor + sharded) * work.positions
    logits = work.scored * model.vocab_size
    return 2 * (itemsize * blocks + 4 * logits) / chips


def update_bytes(model: DecoderConfig, work: Work, execution: Execution, held: ChipBytes) -> float:
    """Memory traffic of a chip for one update, in bytes.

    State is read and written once. Gradient sums are read and written for every microbatch, and read by the optimizer.
    """
    again, tensor = _recomputed_forwards(execution.remat), execution.sizes["tensor"]
    forward = forward_bytes(model, work, chips=execution.chips, tensor=tensor, itemsize=execution.itemsize)
    # Weights are written when gathered and read when used: forward, backward, and in recomputation.
    weights = work.microbatches * 2 * (2 + again) * held.weights
    return (3 + again) * forward + weights + 2 * held.state + (2 * work.microbatches + 2) * held.gradients


class Analytic(NamedTuple):
    """Network traffic of a step, in bytes that a chip sends, where no compiled program can be read."""

    within: float  # a host, or a slice
    across: float


def network_bytes(
    model: DecoderConfig, work: Work, execution: Execution, held: ChipBytes, *, per_host: int, backward: bool
) -> Analytic:
    """Network traffic of a mesh of GPUs.

    For every microbatch, weights are all-gathered and gradients reduce-scattered over `fsdp`, and the outputs of each
    block's two products all-reduced over `tensor`. Gradients are all-reduced over `replica` once. `tensor` is placed
    within a host first, then `fsdp`; a collective over several hosts crosses the network once for each host.

    Args:
      per_host: GPUs that are joined by NVLink.
      backward: whether gradients are computed.
    """
    again, itemsize = _recomputed_forwards(execution.remat), execution.itemsize
    fsdp, tensor, replica = (execution.sizes[axis] for axis in ("fsdp", "tensor", "replica"))
    wide = held.trained * 4 / itemsize
    over_fsdp = work.microbatches * (held.weights * (2 + again if backward else 1) + (wide if backward else 0))
    rows = work.positions / (fsdp * replica)
    over_tensor = 2 * rows * model.width * itemsize * model.layers * 2 * (2 + again if backward else 1)
    over_replica = 2 * wide / fsdp if backward else 0.0
    inside = max(1, min(fsdp, per_host // tensor))  # chips of an fsdp group on the same host
    hosts = fsdp // inside
    within = over_fsdp * (fsdp - 1) / fsdp + over_tensor * (tensor - 1) / tensor
    across = over_fsdp * (hosts - 1) / hosts / inside + over_replica * (replica - 1) / replica
    return Analytic(within, across)


def counted(
    model: DecoderConfig, work: Work, chip: Chip, execution: Execution, held: ChipBytes, *, update: bool
) -> Cost:
    """Counts the cost of an update, or of scoring a batch if `update` is false."""
    if update:
        operations = update_flops(work, execution.remat)
        hbm = update_bytes(model, work, execution, held)
    else:
        operations = work.needed + work.padding
        tensor = execution.sizes["tensor"]
        hbm = forward_bytes(model, work, chips=execution.chips, tensor=tensor, itemsize=execution.itemsize)
        hbm += 2 * work.microbatches * held.weights
    net = network_bytes(model, work, execution, held, per_host=chip.chips_per_host, backward=update)
    rate = chip.links * chip.link_bytes_per_s
    return Cost(operations / execution.chips, hbm, net.within / rate, net.within, net.across)


def activation_bytes(model: DecoderConfig, positions: float, *, tensor: int, itemsize: int, remat: str) -> float:
    """Bytes of a chip's activations: those saved for the backward pass, and those of one block being computed.

    Args:
      positions: of one microbatch on this chip.
      tensor: size of the mesh axis of that name.
      itemsize: bytes of a number in the compute type.
      remat: see `config.Model.remat`; empty if there is no backward pass.
    """
    m = model
    replicated, sharded = block_arrays(m)
    products = (2 * m.heads + 2 * m.kv_heads) * m.head_dim + (2 if m.gated else 1) * m.active_width
    # Of the experts' arrays only the products with gate and up are saved, whatever the policy.
    lines, hidden = 2 * m.experts_per_token * m.width, m.active_width if m.experts else 0
    saved = {
        "": 0.0,
        "offload": 0.0,
        "block": m.width,
        "dots": (2 if m.experts else 3) * m.width + products / tensor,
        "none": replicated - lines + (sharded - hidden) / tensor,
    }
    at_work = replicated + sharded / tensor
    return itemsize * positions * (m.layers * saved[remat] + (2 if remat else 1) * at_work)


def weight_bytes(model: DecoderConfig, gathered: float, *, itemsize: int, trained: float) -> float:
    """Bytes of gathered weights on a chip: one layer's in use, and the next layer's being gathered.

    Args:
      gathered: bytes of a chip's part of all weights, in the compute type, with `fsdp` gathered.
      trained: the part of `gathered` that has gradients; 0 without a backward pass.
    """
    # The float32 gradients of all experts of a layer exist before the first of them is reduce-scattered.
    gradients = trained * 4 / itemsize if model.experts else 0
    return (2 * gathered + gradients) / model.layers
