"""TODO runtime.xla."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import jax

from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.files import cache_folder
from dpo_jax.runtime.terminal import say

# XLA may leave out the rounding of bfloat16 intermediates, and does so in other places where a gradient is wanted too.
# The update would then score the reference's own weights unlike the reference pass did: 0.15 nats apart in a trial.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class Compiled:
    """A jitted function that is compiled at its first call and then once and for all: other shapes are an error."""

    def __init__(self, name: str, function: Any, watch: Stopwatch):
        self._name, self._function, self._watch, self._program = name, function, watch, None

    def compile(self, *args: Any, options: dict[str, Any] | None = None) -> Any:
        """The compiled program for arguments like these, of which shapes, types and places are enough.

        Args:
          options: of the compiler, besides those of the function.
        """
        if self._program is None:
            started = time.perf_counter()
            with self._watch.part("compile"):
                self._program = self._function.lower(*args).compile(options)
            memory = self._program.memory_analysis()
            size = f", {memory.temp_size_in_bytes:,} bytes of temporaries a device" if memory is not None else ""
            say(f"compiled {self._name} in {time.perf_counter() - started:.1f} s{size}")
            give_back_freed()
        return self._program

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)


def give_back_freed() -> None:
    """Has glibc give freed memory back to the system: the compiler frees hundreds of MiB, which it would hold on to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_compiled() -> None:
    """Has JAX keep compiled programs in the user's cache, unless a folder is set already or its cache is turned off."""
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is None and settings["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
