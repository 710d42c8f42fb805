"""Checks of a batch: its shapes and types, which a trace knows, and its values, where they are concrete."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, PyTree

from dpo_jax.types import AnyArray, Batch, InputError, listed

KINDS = {"b": "true or false", "i": "whole numbers", "f": "numbers"}  # of the elements of an array
# Names of a loss's inputs; no auxiliary output of a model may have one.
RESERVED = ("policy", "reference", "lengths", "present", "running", "baseline", "kl", "weight", "margin")


def check_batch(batch: Batch, *, crops: int = 0, place: str = "batch") -> None:
    """Raises InputError unless the arrays of a batch fit together.

    A step of `steps` calls it when it is traced, so it takes no time afterwards. A trace knows shapes and types only.
    Called on concrete arrays, it checks the values too: that no pair is in two microbatches, that `count` is at most
    the number of microbatches, that lengths and weights are not below 0, and that the numbers of pairs are finite.
    Within a compiled step, a batch that breaks one of the first two has a loss and gradient of nan.

    Args:
      crops: number of functions that crop microbatches.
      place: name of the batch in errors.
    """
    microbatches = _check_rows(batch.rows, f"{place}.rows")
    _check(f"{place}.present", batch.present, ("A", "P"), {"A": microbatches}, "b", "It says which pairs are in which.")
    pairs = np.shape(batch.present)[1]
    sizes = {"A": microbatches, "P": pairs}
    _check(f"{place}.count", batch.count, (), sizes, "i", "It is how many of the microbatches are used.")
    summed = "Sum over answer tokens; pairs come first."
    _check(f"{place}.reference", batch.reference, ("P", "K"), sizes, "f", summed)
    sizes["K"] = np.shape(batch.reference)[1]
    _check(f"{place}.lengths", batch.lengths, ("P", "K"), sizes, "i", "Count the scored tokens of each answer.")
    for name, values in (batch.reference_sums or {}).items():
        _check(f"{place}.reference_sums[{name!r}]", values, ("P", "K"), sizes, "f", summed)
    for name, values in (("weight", batch.weight), ("margin", batch.margin)):
        if values is not None:
            _check(f"{place}.{name}", values, ("P",), sizes, "f", "Give one number for each pair.")
    if batch.crop is not None:
        _check(f"{place}.crop", batch.crop, ("A",), sizes, "i", "Give the index of each microbatch's crop.")
        if not crops:
            remedy = "Give `crops` to the function that makes the step, or leave `crop` out."
            raise InputError(
                f"{place}.crop", got="got an array", expected="None, or functions that crop", remedy=remedy
            )
    if batch.mismatched is not None:
        check_batch(batch.mismatched, crops=crops, place=f"{place}.mismatched")
        of_answers = np.shape(batch.mismatched.reference)
        if of_answers != (pairs, sizes["K"]):
            remedy = "Give each prompt with the answers to another one."
            _refuse(f"{place}.mismatched.reference", of_answers, f"shape [P={pairs}, K={sizes['K']}]", remedy)
    if all(map(_is_concrete, jax.tree.leaves(batch._replace(rows=None, mismatched=None)))):
        _check_values(batch, crops, place)


def _check_rows(rows: PyTree, place: str) -> int:
    """Returns the number of microbatches of `rows`, which all its arrays share."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(rows)]
    remedy = "Stack microbatches on a leading axis; a single one has the size 1."
    if not shapes or not all(shape and shape[0] == shapes[0][0] for shape in shapes):
        got = f"arrays of shapes {listed([_written(shape) for shape in shapes])}" if shapes else "no array"
        raise InputError(place, got=got, expected="arrays of shape [A, ...] for A microbatches", remedy=remedy)
    return shapes[0][0]


def _check(
    place: str, array: AnyArray, axes: tuple[str, ...], sizes: Mapping[str, int], kind: str, remedy: str
) -> None:
    """Raises InputError unless an array has these axes, with the known sizes, and elements of this kind."""
    shape = np.shape(array)
    if len(shape) != len(axes) or any(sizes.get(axis, size) != size for axis, size in zip(axes, shape, strict=True)):
        named = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        _refuse(place, shape, f"shape [{named}]", remedy)
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    types = {"b": (np.bool_,), "i": (np.integer,), "f": (np.floating, np.integer)}[kind]
    if not any(jnp.issubdtype(dtype, each) for each in types):
        raise InputError(place, got=f"got type {dtype}", expected=KINDS[kind], remedy=remedy)


def _refuse(place: str, shape: tuple[int, ...], expected: str, remedy: str) -> None:
    raise InputError(place, got=f"got shape {_written(shape)}", expected=expected, remedy=remedy)


def _written(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _is_concrete(leaf: object) -> bool:
    """Whether the values of a leaf can be read here and now."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, Tracer) and leaf.is_fully_addressable
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def _check_values(batch: Batch, crops: int, place: str) -> None:
    """Raises InputError for values that cannot be true."""
    present = np.asarray(batch.present, bool).reshape(np.shape(batch.present))
    count = int(np.asarray(batch.count))
    if not 0 <= count <= len(present):
        expected = f"at most {len(present)}, the number of microbatches"
        raise InputError(f"{place}.count", got=f"got {count}", expected=expected, remedy="Count those in use.")
    present = present[:count]
    twice = np.flatnonzero(present.sum(0) > 1)
    if len(twice):
        holders = listed([str(i) for i in np.flatnonzero(present[:, twice[0]])])
        got = f"pair {twice[0]} is in microbatches {holders}"
        raise InputError(
            f"{place}.present",
            got=got,
            expected="each pair in one microbatch",
            remedy="Leave it in one of them; it would count twice.",
        )
    real = np.asarray(present.any(0))
    numbers = {"reference": batch.reference, "weight": batch.weight, "margin": batch.margin, "lengths": batch.lengths}
    numbers |= {f"reference_sums[{name!r}]": values for name, values in (batch.reference_sums or {}).items()}
    for name, values in numbers.items():
        bad = np.zeros(len(real), bool)
        if values is not None:
            array = np.asarray(values)
            wrong = ~np.isfinite(array) | ((array < 0) if name in ("weight", "lengths") else False)
            bad = real & wrong.reshape(len(real), -1).any(1)
        if bad.any():
            at = np.flatnonzero(bad)[0]
            expected = "finite numbers" + (" not below 0" if name in ("weight", "lengths") else "")
            got = f"pair {at} has {np.asarray(values)[at]}"
            raise InputError(f"{place}.{name}", got=got, expected=expected, remedy="Correct it, or drop the pair.")
    if batch.crop is not None and not all(0 <= each < crops for each in np.asarray(batch.crop)[:count]):
        expected = f"indices below {crops}, the number of crops"
        raise InputError(f"{place}.crop", got=f"got {np.asarray(batch.crop)}", expected=expected, remedy="Correct it.")


def without_padding(batch: Batch) -> Batch:
    """Returns the batch with zeros for its padding pairs, and without the microbatches that are not used.

    Whatever stands in padding, such as nan, then reaches neither a loss nor its gradient.
    """
    used = jnp.arange(len(batch.present)) < batch.count
    present = batch.present & used[:, None]
    real = present.any(0)

    def masked(values: PyTree) -> PyTree:
        return None if values is None else jnp.where(real.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)

    return batch._replace(
        present=present,
        reference=masked(batch.reference),
        lengths=masked(batch.lengths),
        reference_sums=None if batch.reference_sums is None else jax.tree.map(masked, batch.reference_sums),
        weight=masked(batch.weight),
        margin=masked(batch.margin),
    )


def is_consistent(batch: Batch) -> Bool[Array, ""]:
    """Whether `count` is a number of microbatches and no pair is in two of those in use; for the program."""
    microbatches = len(batch.present)
    used = jnp.arange(microbatches) < batch.count
    return (batch.count >= 0) & (batch.count <= microbatches) & ((batch.present & used[:, None]).sum(0) <= 1).all()


def check_scored(scored: PyTree, has_aux: bool, shape: tuple[int, ...]) -> None:
    """Raises InputError unless a `logps_fn` returned an array [P, K], or with `has_aux` (array, {name: [P, K]}).

    Args:
      shape: [P, K].
    """
    pairs = f"[P={shape[0]}, K={shape[1]}]"
    expected = f"(log-probs {pairs}, {{name: sums {pairs}}})" if has_aux else f"log-probs {pairs}"
    remedy = "Change it, or `has_aux`." if has_aux or isinstance(scored, tuple) else "Sum over answer tokens."
    if has_aux:
        if not (isinstance(scored, tuple) and len(scored) == 2 and isinstance(scored[1], Mapping)):
            raise InputError("logps_fn", got=f"it returns {_kind(scored)}", expected=expected, remedy=remedy)
        arrays = {"log-probs": scored[0]} | {name: each for name, each in scored[1].items() if name != "tokens"}
    else:
        arrays = {"log-probs": scored}
    for name, array in arrays.items():
        if name in RESERVED:
            remedy = "Rename it: a loss has an input of that name."
            raise InputError("logps_fn", got=f"it returns {name!r}", expected="another name", remedy=remedy)
        fits = getattr(array, "shape", None) == shape and jnp.issubdtype(jnp.result_type(array), jnp.floating)
        if not fits:
            got = f"it returns {name} as {_kind(array)}"
            raise InputError("logps_fn", got=got, expected=expected, remedy=remedy)


def _kind(value: AnyArray) -> str:
    if hasattr(value, "shape"):
        return f"{value.dtype}{_written(value.shape)}"
    return f"a {type(value).__name__}"
