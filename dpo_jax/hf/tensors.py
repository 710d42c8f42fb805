"""Tables that tie the tensors of a Hugging Face checkpoint to the leaves of our parameters, in both directions.

A family lists its tensors once. Reading and writing walk the same list, so a name or a layout cannot be right in one
direction and wrong in the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.types import InputError

# safetensors' codes of the types that weights may have, widest alignment first, as files are ordered.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
STACKED = ("layer", "expert")
Sizes = Mapping[str, int]  # of each of these, how many there are
MAX_LISTED = 20  # problems named in one error; the rest are counted


class Tensor(NamedTuple):
    """One Hugging Face tensor, or one in each layer, and the leaves that hold its numbers.

    Where the name has `{layer}`, or `{layer}` and `{expert}`, the leaves are stacked: each has leading axes L, or L and
    E, and `to_leaves` and `to_tensor` deal with one layer or expert of it. The two are exact inverses, and `to_leaves`
    gives views, by which a part of a leaf is found in the file: it slices, transposes and splits axes, and never
    copies.
    """

    names: tuple[str, ...]  # names it goes by; the first is the one written where no base checkpoint has another
    leaves: tuple[str, ...]  # paths such as blocks/attention/q/kernel
    shape: tuple[int, ...]  # as the checkpoint stores it
    to_leaves: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_tensor: Callable[..., np.ndarray]
    repeats: bool = False  # may be absent, and if present must equal the leaf that another tensor fills
    # Of a linear map [I, O] called so, and a rank r: the tensors of A [I, r] and B [r, O], see `adapters`.
    low_rank: Callable[[str, int], tuple[Tensor, Tensor]] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """What the leaves are stacked by."""
        return tuple(axis for axis in STACKED if f"{{{axis}}}" in self.names[0])

    def stacks(self, sizes: Sizes) -> tuple[int, ...]:
        """The leading axes of the leaves."""
        return tuple(sizes[axis] for axis in self.axes)

    def called(self, at: Sequence[int]) -> list[str]:
        """The names of one of the tensors."""
        return [name.format(**dict(zip(self.axes, at, strict=True))) for name in self.names]


class Header(NamedTuple):
    """What a safetensors file says of a tensor before its numbers are read."""

    dtype: str  # safetensors' code, such as BF16
    shape: tuple[int, ...]


class Bound(NamedTuple):
    """A tensor of a checkpoint by its actual name, and where in the leading axes of its leaves it stands."""

    name: str
    tensor: Tensor
    at: tuple[int, ...]


def plain(names: str | tuple[str, ...], leaf: str, shape: tuple[int, ...], *, repeats: bool = False) -> Tensor:
    """A tensor stored as we hold it: embeddings, heads, norms."""
    names = (names,) if isinstance(names, str) else names
    return Tensor(names, (leaf,), shape, lambda t: (t,), lambda a: a, repeats)


def bias(name: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
    """A bias: stored flat, held as `shape`."""
    return joined_bias(name, (leaf,), (shape,))


def joined_bias(name: str, leaves: tuple[str, ...], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Several biases one after another: stored flat, held as `shapes`."""
    spans = _spans(shapes)
    return Tensor(
        (name,),
        leaves,
        (spans[-1].stop,),
        lambda t: tuple(t[span].reshape(shape) for span, shape in zip(spans, shapes, strict=True)),
        lambda *a: a[0].reshape(-1) if len(a) == 1 else np.concatenate([part.reshape(-1) for part in a]),
    )


def matrix(name: str, leaf: str, inputs: tuple[int, ...], outputs: tuple[int, ...], *, turned: bool = True) -> Tensor:
    """A linear map: stored [out, in] with axes of each side flattened, held [*inputs, *outputs].

    Args:
      turned: False: stored [in, out].
    """
    return joined_matrix(name, (leaf,), inputs, (outputs,), turned=turned)


def joined_matrix(
    name: str,
    leaves: tuple[str, ...],
    inputs: tuple[int, ...],
    outputs: Sequence[tuple[int, ...]],
    *,
    turned: bool = True,
) -> Tensor:
    """Several linear maps of the same input, one after another on the side of their outputs; otherwise as `matrix`."""
    spans = _spans(outputs)
    stored = (math.prod(inputs), spans[-1].stop)

    def to_leaves(t: np.ndarray) -> tuple[np.ndarray, ...]:
        t = t.T if turned else t
        return tuple(t[:, span].reshape(*inputs, *shape) for span, shape in zip(spans, outputs, strict=True))

    def to_tensor(*a: np.ndarray) -> np.ndarray:
        flat = [part.reshape(stored[0], -1) for part in a]
        t = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
        return t.T if turned else t

    def low_rank(module: str, rank: int) -> tuple[Tensor, Tensor]:
        b = joined_matrix(f"{module}.lora_B.weight", _beside(leaves, "lora_b"), (rank,), outputs)
        return _first_factor(module, leaves, inputs, rank), b

    return Tensor((name,), leaves, stored[::-1] if turned else stored, to_leaves, to_tensor, low_rank=low_rank)


def _first_factor(module: str, leaves: tuple[str, ...], inputs: tuple[int, ...], rank: int) -> Tensor:
    """A of a linear map, one for all the maps that are stored as one: it stands beside the first of them."""
    return matrix(f"{module}.lora_A.weight", _beside(leaves[:1], "lora_a")[0], inputs, (rank,))


def _beside(leaves: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Paths of leaves of another name next to these."""
    return tuple(f"{leaf.rpartition('/')[0]}/{name}" for leaf in leaves)


def _spans(shapes: Sequence[tuple[int, ...]]) -> list[slice]:
    """Where each of several flattened shapes lies when they stand one after another."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def interleaved_matrix(name: str, leaves: tuple[str, ...], width: int, heads: int, head_dim: int) -> Tensor:
    """Several per-head maps in one: stored [heads * maps * head_dim, width], held [width, heads, head_dim] each."""
    maps = len(leaves)

    def low_rank(module: str, rank: int) -> tuple[Tensor, Tensor]:
        b = interleaved_matrix(f"{module}.lora_B.weight", _beside(leaves, "lora_b"), rank, heads, head_dim)
        return _first_factor(module, leaves, (width,), rank), b

    return Tensor(
        (name,),
        leaves,
        (heads * maps * head_dim, width),
        lambda t: tuple(t.reshape(heads, maps, head_dim, width).transpose(1, 3, 0, 2)),
        lambda *a: np.stack(a).transpose(2, 0, 3, 1).reshape(-1, width),
        low_rank=low_rank,
    )


def interleaved_bias(name: str, leaves: tuple[str, ...], heads: int, head_dim: int) -> Tensor:
    """The biases of `interleaved_matrix`: stored [heads * maps * head_dim], held [heads, head_dim] each."""
    maps = len(leaves)
    return Tensor(
        (name,),
        leaves,
        (heads * maps * head_dim,),
        lambda t: tuple(t.reshape(heads, maps, head_dim).transpose(1, 0, 2)),
        lambda *a: np.stack(a).transpose(1, 0, 2).reshape(-1),
    )


def leaf_shapes(table: Sequence[Tensor], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Path and shape of every leaf the table fills. Each leaf must be filled once, and each name used once."""
    names = [name for tensor in table for name in tensor.names]
    assert len(set(names)) == len(names), f"a tensor name stands twice in the table: {sorted(names)}"
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in table:
        if tensor.repeats:
            continue
        # An array without storage (all strides 0) has its shape taken apart as the real one will.
        parts = tensor.to_leaves(np.broadcast_to(np.float32(0), tensor.shape))
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            assert leaf not in shapes, f"two tensors fill {leaf}"
            shapes[leaf] = *tensor.stacks(sizes), *part.shape
    assert all(leaf in shapes for tensor in table for leaf in tensor.leaves)
    return shapes


def all_names(table: Sequence[Tensor], sizes: Sizes) -> list[Bound]:
    """Every tensor of a new checkpoint under its first name, without the optional ones."""
    return [
        Bound(tensor.called(at)[0], tensor, at)
        for tensor in table
        if not tensor.repeats
        for at in np.ndindex(*tensor.stacks(sizes))
    ]


def bind(
    table: Sequence[Tensor], sizes: Sizes, headers: Mapping[str, Header], *, skipped: str, place: str
) -> list[Bound]:
    """Finds every tensor of the table in a checkpoint, in table order.

    Args:
      headers: the checkpoint's tensors by name.
      skipped: pattern of names, matched in full, that hold nothing a model needs.
      place: the checkpoint, for errors.
    Raises: InputError naming every missing, unexpected and misshapen tensor at once.
    """
    bound: list[Bound] = []
    problems: list[str] = []
    for tensor in table:
        for at in np.ndindex(*tensor.stacks(sizes)):
            names = tensor.called(at)
            name = next((name for name in names if name in headers), None)
            if name is not None:
                bound.append(Bound(name, tensor, at))
            elif not tensor.repeats:
                problems.append(f"missing {' or '.join(names)} {list(tensor.shape)}")
    used = {b.name: b.tensor.shape for b in bound}
    for name, header in sorted(headers.items()):
        if name in used and header.shape != used[name]:
            problems.append(f"{name} is {list(header.shape)}, not {list(used[name])}")
        elif name in used and header.dtype not in FLOATS:
            problems.append(f"{name} is {header.dtype}, not one of {', '.join(FLOATS)}")
        elif name not in used and not re.fullmatch(skipped, name):
            problems.append(f"unexpected {name} {list(header.shape)}")
    if problems:
        more = len(problems) - MAX_LISTED
        raise InputError(
            place,
            got="; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else ""),
            expected="exactly the tensors that config.json describes",
            remedy="Compare config.json with the checkpoint; weights merged or saved by another tool may need "
            "converting first.",
        )
    return bound
