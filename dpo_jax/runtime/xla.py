"""Compiling with XLA: the options that programs share, a function that compiles once, and the cache of programs."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import PyTree

from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.files import cache_folder
from dpo_jax.runtime.quantities import duration, size
from dpo_jax.runtime.terminal import say, waiting
from dpo_jax.trees import path_name

Options: TypeAlias = Mapping[str, bool | int | float | str]  # of the compiler, by name

# XLA may skip the rounding of bfloat16 intermediates, and skips it elsewhere in a program that also has a gradient. The
# update and the reference pass would then score the same weights differently: by 0.15 nats in a trial.
COMPILER_OPTIONS: dict[str, bool | str] = {"xla_allow_excess_precision": False}


class Leaf(NamedTuple):
    """Shape, type and sharding of one array among the arguments of a program."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: jax.sharding.Sharding | None  # None: the program may choose

    def accepts(self, other: Leaf) -> bool:
        """Whether a program compiled for this leaf takes the other in its place."""
        if self[:3] != other[:3]:
            return False
        unbound = self.sharding is None or other.sharding is None
        return unbound or self.sharding.is_equivalent_to(other.sharding, len(self.shape))  # type: ignore[union-attr]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" + ("" if self.sharding is None else f" sharded as {self.sharding}")


class Compiled:
    """A jitted function that is compiled once, at its first call; arguments of other shapes are an error.

    Args:
      last: arguments that end each call, such as numbers that the program does not hold as constants.

    Raises: TypeError that names the program and the first argument leaf whose shape, type or sharding is not the one it
      was compiled for; or that the compiler options differ.
    """

    def __init__(self, name: str, function: Any, watch: Stopwatch, last: tuple[PyTree, ...] = ()):
        self._name, self._function, self._watch, self._last = name, function, watch, last
        self._program: jax.stages.Compiled | None = None
        self._leaves: list[Leaf] = []
        self._options: dict[str, bool | int | float | str] | None = None

    def compile(self, *args: PyTree, options: Options | None = None) -> jax.stages.Compiled:
        """Returns the program for arguments like these: arrays, or structs of shape, dtype and sharding.

        Args:
          options: of the compiler, added to those of the function; None at a later call: as at the first.
        """
        args = (*args, *self._last)
        if self._program is None:
            self._options, self._leaves = None if options is None else dict(options), leaves_of(args)
            self._program = self._compile(args)
            return self._program
        if options is not None and dict(options) != (self._options or {}):
            raise TypeError(
                f"program {self._name!r}: got compiler options {dict(options)}; "
                f"expected {self._options or {}}, with which it is compiled. Make another program."
            )
        if difference := self._difference(args):
            raise TypeError(difference)
        return self._program

    def __call__(self, *args: PyTree) -> PyTree:
        program = self.compile(*args) if self._program is None else self._program
        args = (*args, *self._last)
        try:
            return program(*args)
        except (TypeError, ValueError) as error:
            # JAX checks arguments at each call anyway, but its error lacks the program and sometimes the argument.
            if difference := self._difference(args):
                raise TypeError(difference) from error
            raise

    def _compile(self, args: tuple[PyTree, ...]) -> jax.stages.Compiled:
        started = time.perf_counter()
        with self._watch.part("compile"), waiting(f"compiling {self._name}"):
            program = self._function.lower(*args).compile(self._options)
        memory = program.memory_analysis()
        temporaries = "" if memory is None else f", {size(memory.temp_size_in_bytes)} of temporaries per device"
        say(f"compiled {self._name} in {duration(time.perf_counter() - started)}{temporaries}")
        give_back_freed()
        return program

    def _difference(self, args: tuple[PyTree, ...]) -> str:
        """Describes the first leaf of the arguments that the program was not compiled for; empty if there is none."""
        expected, got = {leaf.path: leaf for leaf in self._leaves}, {leaf.path: leaf for leaf in leaves_of(args)}
        for path in [*expected, *got]:
            before, now = expected.get(path), got.get(path)
            if before is None or now is None or not before.accepts(now):
                return (
                    f"program {self._name!r}, argument {path}: got {now or 'none'}; "
                    f"expected {before or 'none'}, for which it is compiled. Make another program for other arguments."
                )
        return ""


def leaves_of(args: tuple[PyTree, ...]) -> list[Leaf]:
    """Returns shape, type and sharding of every array in the arguments; paths begin with the argument's index."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda *args: args, *args))
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return [
        Leaf(path_name(path), shape.shape, shape.dtype.name, _sharding_of(leaf))
        for (path, leaf), shape in zip(leaves, shapes, strict=True)
    ]


def _sharding_of(leaf: object) -> jax.sharding.Sharding | None:
    """Returns the sharding that a program must have for a leaf; None for numbers, host and uncommitted arrays."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def give_back_freed() -> None:
    """Has glibc return freed memory to the system: the compiler frees hundreds of MiB, which glibc would keep."""
    trim: Callable[[int], int] | None = None
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_compiled() -> None:
    """Has JAX cache compiled programs in the user's cache folder, unless another is set or its cache is turned off."""
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is None and settings["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
