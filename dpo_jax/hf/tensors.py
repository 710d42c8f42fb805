"""Tables of a checkpoint's tensors and the leaves of our parameters that each fills, for reading and writing.

A family lists its tensors once. Reading and writing use the same list, so a name or a layout cannot be right in one
direction and wrong in the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.hf import mismatch

# safetensors' codes of the types that weights may have, widest alignment first, as files are ordered.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
STACKED = ("layer", "expert")  # leading axes of leaves, and fields of tensor names
Sizes = Mapping[str, int]  # {"layer": layers of the model, "expert": experts in a layer}


class Tensor(NamedTuple):
    """One Hugging Face tensor, or one in each layer, and the leaves that hold its numbers.

    Where the name has `{layer}`, or `{layer}` and `{expert}`, the leaves are stacked: each has leading axes L, or L and
    E, and `to_leaves` and `to_tensor` convert one layer or expert of it. The two are exact inverses. `to_leaves`
    returns views, which tell where a part of a leaf is in the file: it slices, transposes and splits axes, and never
    copies.
    """

    names: tuple[str, ...]  # possible names; the first is written where no base checkpoint has another
    leaves: tuple[str, ...]  # paths such as blocks/attention/q/kernel
    shape: tuple[int, ...]  # as the checkpoint stores it
    to_leaves: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_tensor: Callable[..., np.ndarray]
    repeats: bool = False  # optional; if present it must equal the leaf that another tensor fills
    # For linear maps [I, O]: (name of the module, rank r) -> tensors of A [I, r] and B [r, O]; see `adapters`.
    low_rank: Callable[[str, int], tuple[Tensor, Tensor]] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the leading axes of the leaves."""
        return tuple(axis for axis in STACKED if f"{{{axis}}}" in self.names[0])

    def stacks(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the sizes of the leading axes of the leaves."""
        return tuple(sizes[axis] for axis in self.axes)

    def called(self, at: Sequence[int]) -> list[str]:
        """Returns the possible names of the tensor of one layer, or of one expert of a layer."""
        return [name.format(**dict(zip(self.axes, at, strict=True))) for name in self.names]


class Header(NamedTuple):
    """Type and shape of a tensor, from the header of a safetensors file."""

    dtype: str  # safetensors' code, such as BF16
    shape: tuple[int, ...]


class Bound(NamedTuple):
    """A tensor of a checkpoint by its actual name, and its index in the leading axes of its leaves."""

    name: str
    tensor: Tensor
    at: tuple[int, ...]


def plain(names: str | tuple[str, ...], leaf: str, shape: tuple[int, ...], *, repeats: bool = False) -> Tensor:
    """Describes a tensor that has the same layout in the checkpoint and in our parameters: embeddings, heads, norms."""
    names = (names,) if isinstance(names, str) else names
    return Tensor(names, (leaf,), shape, lambda t: (t,), lambda a: a, repeats)


def bias(name: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
    """Describes a bias: flat in the checkpoint, `shape` in our parameters."""
    return joined_bias(name, (leaf,), (shape,))


def joined_bias(name: str, leaves: tuple[str, ...], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Describes several biases, concatenated in one flat tensor; their shapes in our parameters are `shapes`."""
    spans = _spans(shapes)
    return Tensor(
        (name,),
        leaves,
        (spans[-1].stop,),
        lambda t: tuple(t[span].reshape(shape) for span, shape in zip(spans, shapes, strict=True)),
        lambda *a: a[0].reshape(-1) if len(a) == 1 else np.concatenate([part.reshape(-1) for part in a]),
    )


def matrix(
    name: str, leaf: str, inputs: tuple[int, ...], outputs: tuple[int, ...], *, transposed: bool = True
) -> Tensor:
    """Describes a linear map: [out, in] in the checkpoint, each side flat, and [*inputs, *outputs] in our parameters.

    Args:
      transposed: False: it is [in, out] in the checkpoint.
    """
    return joined_matrix(name, (leaf,), inputs, (outputs,), transposed=transposed)


def joined_matrix(
    name: str,
    leaves: tuple[str, ...],
    inputs: tuple[int, ...],
    outputs: Sequence[tuple[int, ...]],
    *,
    transposed: bool = True,
) -> Tensor:
    """Describes several linear maps of one input, concatenated along their outputs; otherwise as `matrix`."""
    spans = _spans(outputs)
    stored = (math.prod(inputs), spans[-1].stop)

    def to_leaves(t: np.ndarray) -> tuple[np.ndarray, ...]:
        t = t.T if transposed else t
        return tuple(t[:, span].reshape(*inputs, *shape) for span, shape in zip(spans, outputs, strict=True))

    def to_tensor(*a: np.ndarray) -> np.ndarray:
        flat = [part.reshape(stored[0], -1) for part in a]
        t = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
        return t.T if transposed else t

    def low_rank(module: str, rank: int) -> tuple[Tensor, Tensor]:
        b = joined_matrix(f"{module}.lora_B.weight", _beside(leaves, "lora_b"), (rank,), outputs)
        return _first_factor(module, leaves, inputs, rank), b

    return Tensor((name,), leaves, stored[::-1] if transposed else stored, to_leaves, to_tensor, low_rank=low_rank)


def _first_factor(module: str, leaves: tuple[str, ...], inputs: tuple[int, ...], rank: int) -> Tensor:
    """Describes A of a linear map. Maps stored as one tensor share it; its leaf is next to the first of them."""
    return matrix(f"{module}.lora_A.weight", _beside(leaves[:1], "lora_a")[0], inputs, (rank,))


def _beside(leaves: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Returns the paths of leaves of another name in the same modules."""
    return tuple(f"{leaf.rpartition('/')[0]}/{name}" for leaf in leaves)


def _spans(shapes: Sequence[tuple[int, ...]]) -> list[slice]:
    """Returns the span of each of several shapes in their flat concatenation."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def interleaved_matrix(name: str, leaves: tuple[str, ...], width: int, heads: int, head_dim: int) -> Tensor:
    """Describes several linear maps, interleaved head by head.

    In the checkpoint [heads * maps * head_dim, width], in our parameters [width, heads, head_dim] each.
    """
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
    """Describes the biases of `interleaved_matrix`: [heads * maps * head_dim], in our parameters [heads, head_dim]."""
    maps = len(leaves)
    return Tensor(
        (name,),
        leaves,
        (heads * maps * head_dim,),
        lambda t: tuple(t.reshape(heads, maps, head_dim).transpose(1, 0, 2)),
        lambda *a: np.stack(a).transpose(1, 0, 2).reshape(-1),
    )


def leaf_shapes(table: Sequence[Tensor], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the leaves that a table fills; asserts that each is filled once and no name repeats."""
    names = [name for tensor in table for name in tensor.names]
    assert len(set(names)) == len(names), f"a tensor name is twice in the table: {sorted(names)}"
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in table:
        if tensor.repeats:
            continue
        # An array without storage (all strides 0) is split into leaves of the same shapes as the real one.
        parts = tensor.to_leaves(np.broadcast_to(np.float32(0), tensor.shape))
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            assert leaf not in shapes, f"two tensors fill {leaf}"
            shapes[leaf] = *tensor.stacks(sizes), *part.shape
    assert all(leaf in shapes for tensor in table for leaf in tensor.leaves)
    return shapes


def all_names(table: Sequence[Tensor], sizes: Sizes) -> list[Bound]:
    """Returns every tensor of a new checkpoint under its first name, without the optional ones."""
    return [
        Bound(tensor.called(at)[0], tensor, at)
        for tensor in table
        if not tensor.repeats
        for at in np.ndindex(*tensor.stacks(sizes))
    ]


def bind(
    table: Sequence[Tensor],
    sizes: Sizes,
    headers: Mapping[str, Header],
    *,
    skipped: str,
    place: str,
    adapter_remedy: str = "",
) -> list[Bound]:
    """Finds every tensor of a table in a checkpoint; returns them in the order of the table.

    Args:
      headers: the checkpoint's tensors by name.
      skipped: pattern, matched in full, of names of tensors that the model does not need.
      place: the checkpoint, for errors.
      adapter_remedy: for errors; not empty where the tensors are those of an adapter.
    Raises: InputError naming missing, unexpected and misshapen tensors at once, and their cause where it is known.
    """
    bound, faults = match(table, sizes, headers, skipped)
    if any(faults):

        def find(names: Mapping[str, str]) -> mismatch.Faults:
            return match(table, sizes, {names.get(name, name): headers[name] for name in headers}, skipped)[1]

        raise mismatch.explain(faults, find, place=place, adapter_remedy=adapter_remedy)
    return bound


def match(
    table: Sequence[Tensor], sizes: Sizes, headers: Mapping[str, Header], skipped: str
) -> tuple[list[Bound], mismatch.Faults]:
    """Returns the tensors of a table that a checkpoint has, and what is missing, wrong or unexpected in it."""
    bound: list[Bound] = []
    missing: dict[tuple[str, ...], str] = {}
    for tensor in table:
        for at in np.ndindex(*tensor.stacks(sizes)):
            names = tensor.called(at)
            name = next((name for name in names if name in headers), None)
            if name is not None:
                bound.append(Bound(name, tensor, at))
            elif not tensor.repeats:
                missing[tuple(names)] = str([*tensor.shape])
    used = {b.name: b.tensor.shape for b in bound}
    wrong, unexpected = {}, {}
    for name, header in sorted(headers.items()):
        if name in used and header.shape != used[name]:
            wrong[name] = f"is {[*header.shape]}, not {[*used[name]]}"
        elif name in used and header.dtype not in FLOATS:
            wrong[name] = f"is {header.dtype}, not one of {', '.join(FLOATS)}"
        elif name not in used and not re.fullmatch(skipped, name):
            unexpected[name] = str([*header.shape])
    empty = [name for name in wrong if 0 in headers[name].shape]
    return bound, mismatch.Faults(missing, wrong, empty, unexpected)
