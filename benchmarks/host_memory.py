"""Measures the memory of each process while it loads its shards of a checkpoint: several processes on one machine.

    python -m benchmarks.host_memory --gib=2

Writes a random bfloat16 checkpoint in several files and starts --processes processes with --devices virtual CPU devices
each. They load it sharded over all devices (fsdp), as a run does. For each process it reports the bytes that its
devices hold afterwards, the largest increase of its resident memory, and the allowed increase: 1.25 times the held
bytes, plus 1 GiB. On accelerators the held bytes are not in the host's memory, so a host needs less.

Prints a table and writes it to --out as JSON.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

SLACK, FACTOR = 2**30, 1.25  # loading may take FACTOR times the held bytes, plus SLACK bytes
FILES = 8  # number of files of the checkpoint, approximately
SHAPE = dict(model_type="llama", vocab_size=32_000, num_attention_heads=16, num_key_value_heads=8, rms_norm_eps=1e-5)


def write_checkpoint(
    folder: Path,
    *,
    width: int,
    target_bytes: int,
    shape: Mapping[str, Any] = SHAPE,
    wider: int = 3,
    dtype: str = "bfloat16",
) -> int:
    """Writes a random model of about `target_bytes` bytes, with as many layers as this needs; returns its bytes.

    No array is ever in memory as a whole: one vector is drawn for each leaf and repeated in it.

    Args:
      shape: fields of its `config.json` other than the sizes given here.
      wider: width of the feed-forward blocks as a multiple of `width`.
    """
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16

    from dpo_jax import trees
    from dpo_jax.hf import checkpoints
    from dpo_jax.hf.families import family
    from dpo_jax.hf.tensors import leaf_shapes

    sizes = dict(hidden_size=width, intermediate_size=wider * width, max_position_embeddings=2048)
    hf = dict(shape) | sizes
    kind = family(hf | dict(num_hidden_layers=1), "host_memory")

    def shapes(layers: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        described = hf | dict(num_hidden_layers=layers)
        config = kind.decoder_config(described, "host_memory")
        return described, leaf_shapes(kind.tensors(config), config.stacks)

    def size(layers: int) -> int:
        return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for shape in shapes(layers)[1].values())

    layers = max(1, round((target_bytes - size(1)) / (size(2) - size(1))) + 1)
    described, found = shapes(layers)
    rng = np.random.default_rng(0)
    leaves = {
        path: np.broadcast_to(rng.standard_normal(shape[-1]).astype(dtype), shape) for path, shape in found.items()
    }
    total = size(layers)
    params = trees.nest(leaves)
    options = checkpoints.WriteOptions(dtype, max_shard_bytes=total // FILES)
    checkpoints.save_new(params, hf_config=described, out=folder, options=options)
    return total


def load(work: Path, args: Any) -> dict[str, Any]:
    """Loads the checkpoint in one process; returns the bytes that this took and that remain."""
    # These are read once, when jax is first imported.
    os.environ |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={args.devices}", "JAX_PLATFORMS": "cpu"}
    from dpo_jax.config import base, freeze
    from dpo_jax.hf import checkpoints
    from dpo_jax.run import programs, state
    from dpo_jax.run.choices import objective_of
    from dpo_jax.run.inputs import Source
    from dpo_jax.runtime import hosts

    hosts.join(f"127.0.0.1:{args.port}", args.processes, args.process)
    import jax

    chosen = base()
    chosen.model.path, chosen.model.param_dtype = args.model, args.param_dtype
    frozen, folder = freeze(chosen), Path(args.model)
    model, _ = checkpoints.read_config(folder)
    built = programs.make_programs(frozen, objective_of(frozen.loss), model, np.array([[20, 30, 30]]))
    hosts.barrier("ready")  # the devices exist and their threads have their stacks
    common.reset_peak()
    before = common.memory("VmRSS")
    params = state.load_params(Source(folder, None, 0), built)
    peak = common.memory("VmHWM")
    parts = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    kept = sum(part.nbytes for part in parts)
    hosts.barrier("loaded")
    return {
        "kept_bytes": kept,
        "before_bytes": before,
        "risen_bytes": peak - before,
        "left_bytes": common.memory("VmRSS") - before,
    }


def measure(out: Path, model: Path, *, processes: int, devices: int, param_dtype: str) -> list[dict[str, Any]]:
    """Loads a checkpoint in `processes` processes, each with its own folder in `out`; returns the memory of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    given = dict(port=port, processes=processes, devices=devices, model=str(model), param_dtype=param_dtype)

    def one(process: int) -> dict[str, Any]:
        work = out / f"process-{process}"
        return common.in_fresh_process("benchmarks.host_memory:load", work, given | dict(process=process))

    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(one, range(processes)))
    failed = [result["failed"] for result in found if "failed" in result]
    if failed:
        sys.exit(f"loading: {failed[0]}")
    return [result | {"allowed_bytes": FACTOR * result["kept_bytes"] + SLACK} for result in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint in GiB")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2, help="devices of each process")
    parser.add_argument("--param_dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", default="runs/host_memory", help="folder of the results; must not exist")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    if out.exists():
        sys.exit(f"--out={args.out}: exists already; name another folder")
    out.mkdir(parents=True)
    total = write_checkpoint(out / "model", width=args.width, target_bytes=int(args.gib * 2**30))
    found = measure(out, out / "model", processes=args.processes, devices=args.devices, param_dtype=args.param_dtype)
    common.write_results(out, args, {"checkpoint_bytes": total, "processes": found})
    files = len(list((out / "model").glob("*.safetensors")))
    print(f"checkpoint: {common.shown(common.mib(total))} MiB in {files} files")
    rows = [
        {"process": f"{i}"}
        | {f"{name} MiB": common.mib(one[f"{name}_bytes"]) for name in ("before", "kept", "risen", "allowed")}
        | {"risen to kept": common.ratio(one["risen_bytes"], one["kept_bytes"])}
        for i, one in enumerate(found)
    ]
    print(common.table(rows))
    over = [one for one in found if one["risen_bytes"] > one["allowed_bytes"]]
    sys.exit(f"{len(over)} processes took more than is allowed" if over else 0)


if __name__ == "__main__":
    main()
