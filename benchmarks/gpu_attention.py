"""Compares attention over packed rows on a GPU: the Triton kernels of dpo_jax, plain XLA, and cuDNN.

    python -m benchmarks.gpu_attention --json=attention.json
    python -m benchmarks.gpu_attention --sweep --head_dims=128 --lengths=4096   # finds the fastest tiles of this GPU

Rows are packed with random pairs whose lengths are distributed like those of Anthropic's HH. Sides run in turn,
--rounds times:

    triton         the kernels of dpo_jax.models.attention.triton
    xla            the plain implementation, dpo_jax.models.attention.blockwise
    cudnn_mask     jax.nn.dot_product_attention with cuDNN, and the same visibility as a dense mask
    cudnn_causal   cuDNN with causal attention over whole rows: more pairs of tokens, but no mask to read
    triton_causal  the Triton kernels with causal attention over whole rows

Times are medians of the forward pass, and of the forward and backward pass together. TFLOP/s count pairs of tokens of
which one sees the other: 4 d operations per head in the forward pass, 14 d with the backward pass. The error is the
largest deviation from dense float32 attention in one row and one group of heads, relative to its largest value. Prints
a table, ratios and JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.layout import lay_out
from dpo_jax.models.attention import triton
from dpo_jax.models.attention.choose import make_attention
from dpo_jax.types import Encoded

BASE = "triton"  # ratios are times relative to this side


def packed_bounds(rows: int, length: int, *, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [rows, length] of rows filled with pairs: medians of 110 prompt and 45 answer tokens, times `scale`."""
    rng = np.random.default_rng(seed)
    key_start = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    key_end = key_start + 1  # padding sees itself, as in training
    for row in range(rows):
        at = 0
        while True:
            drawn = np.exp(rng.normal(np.log([110, 45, 45]), [0.8, 0.9, 0.9])) * scale
            unit = lay_out(Encoded.of(*(np.zeros(int(n), int) for n in np.clip(drawn, 2, length // 3))), "shared")
            span = slice(at, at + len(unit.tokens))
            if span.stop > length:
                break
            key_start[row, span], key_end[row, span] = unit.key_start + at, unit.key_end + at
            at = span.stop
    return key_start, key_end


def dense_mask(key_start: jax.Array, key_end: jax.Array) -> jax.Array:
    """Mask [R, 1, S, S] of the keys that each query sees."""
    keys = jnp.arange(key_start.shape[1])
    return ((keys >= key_start[..., None]) & (keys < key_end[..., None]))[:, None]


def cudnn(q, k, v, mask=None):
    """cuDNN's attention, causal without a mask."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn")


def dense(q, k, v, key_start, key_end):
    """Dense float32 attention of the query heads that share one key-value head."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("rqhd,rkd->rhqk", q * q.shape[-1] ** -0.5, k[:, :, 0], precision="highest")
    weights = jax.nn.softmax(jnp.where(dense_mask(key_start, key_end), scores, -jnp.inf))
    return jnp.einsum("rhqk,rkd->rqhd", weights, v[:, :, 0], precision="highest")


def with_grads(attend: Callable, q, k, v, grad, *where):
    """Returns out, dq, dk, dv."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *where), q, k, v)
    return out, *pull(grad.astype(out.dtype))


def time_in_turn(calls: dict[Any, Callable], *, rounds: int, repeats: int) -> dict[Any, float | str]:
    """Median seconds of each call, or why it does not run; every round makes `repeats` calls of each."""
    times: dict[Any, list[float]] = {}
    failed: dict[Any, str] = {}
    for name, call in calls.items():
        try:
            jax.block_until_ready(call())
            times[name] = []
        except Exception as error:  # a library that refuses a shape is a result too
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for _ in range(rounds):
        for name, taken in times.items():
            jax.block_until_ready(calls[name]())
            start = time.perf_counter()
            jax.block_until_ready([calls[name]() for _ in range(repeats)])
            taken.append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(times[name]) if name in times else failed[name] for name in calls}


def errors(found: tuple, want: tuple, group: int) -> dict[str, float]:
    """Largest difference of out, dq, dk and dv in the first row and group of heads, as a share of the largest value."""
    shares = {}
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
        one = one[:1, :, : group if name in ("out", "dq") else 1].astype(jnp.float32)
        shares[name] = float(jnp.abs(one - other).max() / jnp.abs(other).max())
    return shares


def make_inputs(args: argparse.Namespace, length: int, width: int):
    """Random q, k, v and cotangent, and packed bounds, of about --tokens tokens."""
    rows = max(1, args.tokens // length)
    heads = args.heads, args.kv_heads, args.kv_heads, args.heads
    keys = jax.random.split(jax.random.key(args.seed), 4)
    arrays = [jax.random.normal(key, (rows, length, n, width), args.dtype) for key, n in zip(keys, heads, strict=True)]
    return arrays, [jnp.asarray(x) for x in packed_bounds(rows, length, scale=args.scale, seed=args.seed)]


def compare(args: argparse.Namespace, length: int, width: int) -> list[dict[str, Any]]:
    """Measures all sides on one shape."""
    arrays, bounds = make_inputs(args, length, width)
    rows, group = len(bounds[0]), args.heads // args.kv_heads
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    causal = [jnp.zeros_like(index), index + 1]
    kernels = make_attention("triton", platform="gpu")
    mask = jax.jit(dense_mask)(*bounds)  # built once, because the layers of a model would share it
    # Of each side: the function, its arguments after q, k and v, and the bounds that these stand for.
    sides: dict[str, tuple[Callable, list[jax.Array], list[jax.Array]]] = {
        "triton": (kernels, bounds, bounds),
        "xla": (make_attention("xla", platform="gpu"), bounds, bounds),
        "cudnn_mask": (cudnn, [mask], bounds),
        "cudnn_causal": (cudnn, [], causal),
        "triton_causal": (kernels, causal, causal),
    }
    forward = {name: functools.partial(jax.jit(side), *arrays[:3], *where) for name, (side, where, _) in sides.items()}
    both = {
        name: functools.partial(jax.jit(functools.partial(with_grads, side)), *arrays, *where)
        for name, (side, where, _) in sides.items()
    }
    timing = dict(rounds=args.rounds, repeats=args.repeats)
    times = {"forward": time_in_turn(forward, **timing), "both": time_in_turn(both, **timing)}
    found = []
    for name, (_, _, seen) in sides.items():
        visible = int((seen[1] - seen[0]).sum())
        row: dict[str, Any] = dict(length=length, head_dim=width, rows=rows, side=name, visible_pairs=visible)
        for phase, flops in (("forward", 4), ("both", 14)):
            took, base = times[phase][name], times[phase][BASE]
            if isinstance(took, str):
                row[f"{phase}_failed"] = took
                continue
            row[f"{phase}_s"] = took
            row[f"{phase}_tflops_per_s"] = flops * width * args.heads * visible / took / 1e12
            row[f"{phase}_ratio"] = None if isinstance(base, str) else took / base
        if "both_s" in row:
            first = [x[:1, :, :n] for x, n in zip(arrays, (group, 1, 1, group), strict=True)]
            want = jax.jit(functools.partial(with_grads, dense))(*first, *(x[:1] for x in seen))
            row["errors"] = errors(both[name](), want, group)
        found.append(row)
    return found


def sweep(args: argparse.Namespace, length: int, width: int) -> list[dict[str, Any]]:
    """Times each kernel with many tile sizes, the others unchanged; prints the fastest five and the present one."""
    arrays, bounds = make_inputs(args, length, width)
    own = triton.choose_blocks(width, args.dtype)
    found = []
    for kernel in triton.Blocks._fields:
        calls = {}
        for sizes in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
            tile = triton.Tile(*sizes)
            attend = functools.partial(triton.attention, blocks=own._replace(**{kernel: tile}))
            if kernel == "out":
                calls[tile] = functools.partial(jax.jit(attend), *arrays[:3], *bounds)
            else:
                calls[tile] = functools.partial(jax.jit(functools.partial(with_grads, attend)), *arrays, *bounds)
        times = time_in_turn(calls, rounds=args.rounds, repeats=args.repeats)
        fastest = sorted((took, tile) for tile, took in times.items() if not isinstance(took, str))[:5]
        for took, tile in [*fastest, (times[getattr(own, kernel)], getattr(own, kernel))]:
            found.append(dict(length=length, head_dim=width, kernel=kernel, tile=tile._asdict(), time_s=took))
            print(f"{length:6} {width:5} {kernel:8} {took} {tile}", flush=True)
    return found


def print_table(found: list[dict[str, Any]]) -> None:
    """Prints one line per side: times in ms, TFLOP/s, time relative to triton, largest error."""
    head = "forward ms", "TFLOP/s", "ratio", "both ms", "TFLOP/s", "ratio", "error"
    print(f"{'length':>6} {'width':>5} {'rows':>4} {'side':13}", *(f"{name:>10}" for name in head))
    for row in found:
        cells = []
        for phase in ("forward", "both"):
            took, ratio = row.get(f"{phase}_s"), row.get(f"{phase}_ratio")
            cells.append("failed" if took is None else f"{took * 1e3:.3f}")
            cells.append("" if took is None else f"{row[f'{phase}_tflops_per_s']:.1f}")
            cells.append("" if ratio is None else f"{ratio:.2f}")
        cells.append(f"{max(row['errors'].values()):.1e}" if "errors" in row else "")
        print(
            f"{row['length']:6} {row['head_dim']:5} {row['rows']:4} {row['side']:13}",
            *(f"{cell:>10}" for cell in cells),
        )
    for row in found:
        for phase in ("forward", "both"):
            if f"{phase}_failed" in row:
                print(f"{row['side']} {row['length']} {row['head_dim']} {phase}: {row[f'{phase}_failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="positions in a row")
    parser.add_argument("--head_dims", type=int, nargs="+", default=[64, 128], help="widths of a head")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv_heads", type=int, default=8, help="key and value heads")
    parser.add_argument("--tokens", type=int, default=16384, help="total positions of all rows")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the lengths of HH's pairs")
    parser.add_argument("--dtype", default="bfloat16", help="type of q, k and v")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each time, >= 10")
    parser.add_argument("--repeats", type=int, default=10, help="calls per sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths and values")
    parser.add_argument(
        "--sweep", action="store_true", help="time tile sizes of the Triton kernels instead (minutes per shape)"
    )
    parser.add_argument("--json", type=Path, help="file for the results as JSON, in addition to standard output")
    args = parser.parse_args()
    if args.rounds < 10:
        parser.error(f"--rounds={args.rounds}: a median of fewer than 10 samples says little")
    if jax.default_backend() != "gpu":
        sys.exit(f"no GPU: jax {jax.__version__} runs on {jax.default_backend()} here, and these kernels need one")
    measure = sweep if args.sweep else compare
    found = [row for width in args.head_dims for length in args.lengths for row in measure(args, length, width)]
    if not args.sweep:
        print_table(found)
    report = json.dumps(
        dict(
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
            options={name: value for name, value in vars(args).items() if name != "json"},
            results=found,
        ),
        indent=1,
    )
    print(report)
    if args.json:
        args.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
