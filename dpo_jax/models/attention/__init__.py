"""Interval attention, one module for each backend, and the choice among them.

`choose` picks an implementation and shards it over a mesh; `blockwise` runs anywhere in plain XLA; `splash` is JAX's
own kernel for TPUs; `triton` has Pallas kernels for NVIDIA GPUs.
"""
