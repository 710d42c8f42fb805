"""Speed of loading and exporting a checkpoint, against reading and writing the same bytes plainly.

    python -m benchmarks.loading --family=llama --gib=2 --check

Makes a random checkpoint of --dtype in several files, or takes --model, and runs these sides in turn, each in a process
of its own, --rounds times:

    read          every file with one readinto() into new memory
    load_file     every file with safetensors.numpy.load_file
    load          checkpoints.load_params, into numpy arrays of the checkpoint's type
    load_by_numpy the same arrays from load_file, with numpy's own copies
    place         the same as float32, onto the CPU as a run places it
    write         the tensors, all of them ready in memory, with write() into files of the same sizes
    save_file     the same with safetensors.numpy.save_file
    export        checkpoints.export of the parameters that `load` returns
    export_by_numpy  the same tensors with numpy's own copies and save_file

Every file is read once before all of them, so that the system has it in memory and no side waits for a disk. Written
files may stay in the system's memory too, on all sides; with --fsync all sides wait for the disk. Before its time
starts every side takes as much memory as it will need and gives it back: in a virtual machine the host may have to find
it, which is slower than anything measured here, and by chance.

Prints for each side the median time, that of all its threads on processors, its speed, the calls that read and wrote
and their bytes, by how much the process grew at its peak, and which part of the plain speed it has, by the clock and by
the time of processors; writes them to --out as JSON. With --check it fails where loading or exporting has less than 0.7
of the plain speed by the clock. On a machine that others use, threads wait for each other; the time of processors is
disturbed less.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, host_memory

TARGET = 0.7  # of the plain speed
NORM = dict(rms_norm_eps=1e-5, num_attention_heads=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(shape=host_memory.SHAPE, wider=3),
    # Query, key and value take turns in rows of one tensor.
    "gpt_neox": dict(shape=dict(model_type="gpt_neox", vocab_size=32_000, num_attention_heads=16), wider=4),
    # They stand one after another in one tensor, and so do both halves of the feed-forward block.
    "phi3": dict(shape=NORM | dict(model_type="phi3", vocab_size=32_000, num_key_value_heads=8), wider=3),
    # Every expert has tensors of its own.
    "mixtral": dict(
        shape=NORM | dict(model_type="mixtral", vocab_size=32_000, num_key_value_heads=8, num_local_experts=8), wider=1
    ),
}
PLAIN = {"load": ("read", "load_file"), "place": ("read", "load_file"), "export": ("write", "save_file")}
CHECKED = ("load", "export")


# --- what is measured ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Measures the body: seconds, CPU seconds, calls and bytes read and written, growth of memory at its peak."""
    found: dict[str, Any] = {}
    common.reset_peak()
    held = common.memory("VmHWM")
    before, used, started = io_counts(), time.process_time(), time.perf_counter()
    yield found
    found |= {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - used}
    found |= {"grown_bytes": common.memory("VmHWM") - held}
    found |= {name: value - before[name] for name, value in io_counts().items()}


def io_counts() -> dict[str, int]:
    """Calls and bytes of this process so far, whether or not they went to a disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    names = {"reads": "syscr", "read_bytes": "rchar", "writes": "syscw", "written_bytes": "wchar"}
    return {name: int(lines[theirs]) for name, theirs in names.items()}


@contextlib.contextmanager
def traced() -> Iterator[list[tuple[str, int, int]]]:
    """A list that gets the file, start and length of all that `checkpoints` reads of weights."""
    from dpo_jax.hf import folders

    found: list[tuple[str, int, int]] = []
    real = folders.read_bytes

    def read_bytes(file: Any, start: int, count: int) -> Any:
        found.append((str(file.path), start, count))
        return real(file, start, count)

    folders.read_bytes = read_bytes
    try:
        yield found
    finally:
        folders.read_bytes = real


def read_again(reads: Iterable[tuple[Any, int, int]]) -> int:
    """Bytes that were read before, of reads by file, start and length."""
    again, last, end = 0, None, 0
    for file, start, count in sorted((str(file), start, count) for file, start, count in reads):
        if file != last:
            last, end = file, 0
        again += max(0, min(end, start + count) - start)
        end = max(end, start + count)
    return again


# --- sides --------------------------------------------------------------------------------------------------------


def read(work: Path, args: Any) -> dict[str, Any]:
    import numpy as np

    warm(args.total)
    with measured() as found:
        kept = []
        for path in weight_files(args):
            kept.append(np.empty(path.stat().st_size, np.uint8))
            with path.open("rb", buffering=0) as file:
                assert file.readinto(kept[-1].data) == kept[-1].nbytes
    return found


def load_file(work: Path, args: Any) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    import safetensors.numpy

    warm(args.total)
    with measured() as found:
        kept = [safetensors.numpy.load_file(path) for path in weight_files(args)]
    assert kept
    return found


def load(work: Path, args: Any) -> dict[str, Any]:
    from dpo_jax.hf import checkpoints

    folder = Path(args.model)
    warm(args.total)
    with traced() as reads, measured() as found:
        config, _ = checkpoints.read_config(folder)
        kept = checkpoints.load_params(folder, config, dtype=own_dtype(args))
    assert kept
    return found | {"read_again_bytes": read_again(reads)}


def load_by_numpy(work: Path, args: Any) -> dict[str, Any]:
    """Loads as `load` does, with safetensors' load_file and numpy's copies."""
    import numpy as np
    import safetensors.numpy

    from dpo_jax.hf.tensors import leaf_shapes

    config, table, bound = names_of(args)
    dtype = own_dtype(args)
    warm(args.total)
    with measured() as found:
        leaves = {path: np.empty(shape, dtype) for path, shape in leaf_shapes(table, config.stacks).items()}
        for path in weight_files(args):
            for name, numbers in safetensors.numpy.load_file(path).items():
                _, tensor, at = bound[name]
                for leaf, part in zip(tensor.leaves, tensor.to_leaves(numbers), strict=True):
                    leaves[leaf][at] = part
    return found


def names_of(args: Any) -> Any:
    """The configuration, the table of its tensors, and the tensors of the checkpoint by name."""
    from dpo_jax.hf import checkpoints, folders, tensors

    folder = Path(args.model)
    config, _ = checkpoints.read_config(folder)
    table, skipped = checkpoints.family_table(folder, config)
    with folders.open_weights(folder) as source:
        bound = tensors.bind(table, config.stacks, source.headers, skipped=skipped, place=str(folder))
    return config, table, {each.name: each for each in bound}


def place(work: Path, args: Any) -> dict[str, Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is first imported
    import jax

    from dpo_jax import sharding
    from dpo_jax.hf import checkpoints

    mesh = sharding.make_mesh(1, 1, 1)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    folder = Path(args.model)

    def put(path: str, shape: tuple[int, ...], read: Callable[[Any], Any]) -> jax.Array:
        return sharding.from_parts(shape, everywhere, read)

    warm(2 * args.total)
    with traced() as reads, measured() as found:
        config, _ = checkpoints.read_config(folder)
        jax.block_until_ready(checkpoints.load_params(folder, config, dtype="float32", place=put))
    return found | {"read_again_bytes": read_again(reads)}


def write(work: Path, args: Any) -> dict[str, Any]:
    def save(tensors: Mapping[str, Any], path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for tensor in tensors.values():
                file.write(tensor.reshape(-1).view("uint8").data)

    return write_files(work, args, save)


def save_file(work: Path, args: Any) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    import safetensors.numpy

    return write_files(work, args, lambda tensors, path: safetensors.numpy.save_file(dict(tensors), path))


def write_files(work: Path, args: Any, save: Callable[[Mapping[str, Any], Path], None]) -> dict[str, Any]:
    """Has the tensors of every file of the checkpoint saved in a file of its own."""
    import ml_dtypes  # noqa: F401  gives numpy its bfloat16
    import safetensors.numpy

    ready = {path.name: safetensors.numpy.load_file(path) for path in weight_files(args)}
    out = work / "out"
    os.sync()  # what others wrote is not written during this
    warm(args.total)
    with measured() as found:
        out.mkdir()
        for name, tensors in ready.items():
            save(tensors, out / name)
        settle(out, args)
    return found | {"size_bytes": remove(out)}


def export(work: Path, args: Any) -> dict[str, Any]:
    from dpo_jax.hf import checkpoints

    folder, out = Path(args.model), work / "out"
    config, _ = checkpoints.read_config(folder)
    params = checkpoints.load_params(folder, config, dtype=own_dtype(args))
    largest = max(path.stat().st_size for path in weight_files(args))
    os.sync()
    warm(args.total)
    with measured() as found:
        checkpoints.export(params, base=folder, out=out, options=checkpoints.WriteOptions(max_shard_bytes=largest))
        settle(out, args)
    return found | {"size_bytes": remove(out)}


def export_by_numpy(work: Path, args: Any) -> dict[str, Any]:
    """Exports as `export` does, with numpy's copies and safetensors' save_file."""
    import numpy as np
    import safetensors.numpy

    from dpo_jax import trees
    from dpo_jax.hf import checkpoints

    config, _, bound = names_of(args)
    leaves = trees.flatten(checkpoints.load_params(Path(args.model), config, dtype=own_dtype(args)))
    files = {}
    for path in weight_files(args):
        with safetensors.safe_open(path, framework="numpy") as file:
            files[path.name] = list(file.keys())
    out = work / "out"
    os.sync()
    warm(args.total)
    with measured() as found:
        out.mkdir()
        for file, names in files.items():
            made = {}
            for name in names:
                _, tensor, at = bound[name]
                parts = (leaves[leaf][at] for leaf in tensor.leaves)
                made[name] = np.ascontiguousarray(tensor.to_tensor(*parts))
            safetensors.numpy.save_file(made, out / file, metadata={"format": "pt"})
        settle(out, args)
    return found | {"size_bytes": remove(out)}


def warm(size: int) -> None:
    """Takes so many bytes of memory, touches every page, and gives them back."""
    import numpy as np

    np.empty(size, np.uint8)[::4096] = 1


def weight_files(args: Any) -> list[Path]:
    """The safetensors files of the checkpoint."""
    return sorted(Path(args.model).glob("*.safetensors"))


def own_dtype(args: Any) -> str:
    """The type of a checkpoint's first tensor, which most have."""
    from dpo_jax.hf import folders
    from dpo_jax.hf.tensors import FLOATS

    with folders.open_weights(Path(args.model)) as source:
        return FLOATS[next(iter(source.headers.values())).dtype]


def settle(out: Path, args: Any) -> None:
    """With --fsync, waits until the files are on the disk."""
    for path in out.iterdir() if args.fsync else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove(out: Path) -> int:
    """Deletes a folder; returns the bytes of the weights that were in it."""
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return size


# --- all of it ----------------------------------------------------------------------------------------------------

SIDES = ("read", "load_file", "load", "load_by_numpy", "place", "write", "save_file", "export", "export_by_numpy")


def compare(results: Mapping[str, Sequence[Mapping[str, Any]]], total: int) -> dict[str, Any]:
    """Medians of every side, and which part of the plain speed loading and exporting have, by clock and processors.

    Args:
      results: of every side, its rounds.
      total: bytes of the checkpoint's files.
    """
    sides: dict[str, Any] = {}
    for side, rounds in results.items():
        seconds, cpu = (statistics.median(one[name] for one in rounds) for name in ("seconds", "cpu_s"))
        sides[side] = {**rounds[-1], "seconds": seconds, "cpu_s": cpu, "bytes_per_s": total / seconds}
    ratios, cpu_ratios = (
        {
            side: {other: sides[other][kind] / sides[side][kind] for other in plain if other in sides}
            for side, plain in PLAIN.items()
            if side in sides
        }
        for kind in ("seconds", "cpu_s")
    )
    return {"sides": sides, "ratios": ratios, "cpu_ratios": cpu_ratios}


def below(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The sides that --check fails for, with what they have."""
    return [
        f"{side} has {common.shown(ratio)} of the speed of {other}"
        for side in CHECKED
        for other, ratio in ratios.get(side, {}).items()
        if ratio < TARGET
    ]


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: a row for each side."""
    rows = []
    for side, one in found["sides"].items():
        row = {"side": side, "seconds": one["seconds"], "CPU s": one["cpu_s"], "GiB/s": one["bytes_per_s"] / 2**30}
        row |= {"reads": one["reads"], "MiB read": common.mib(one["read_bytes"])}
        row |= {"MiB twice": common.mib(one.get("read_again_bytes")), "writes": one["writes"]}
        row |= {"MiB written": common.mib(one["written_bytes"]), "MiB at peak": common.mib(one.get("grown_bytes"))}
        row |= {f"of {kind}": value for kind, value in shares(found["ratios"].get(side, {})).items()}
        rows.append(
            row | {f"CPU of {kind}": value for kind, value in shares(found["cpu_ratios"].get(side, {})).items()}
        )
    return rows


def shares(ratios: Mapping[str, float]) -> dict[str, float]:
    """Ratios to plain calls and to the safetensors library, whichever side they are of."""
    return dict(zip(("read/write", "safetensors"), ratios.values(), strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint folder; empty: a random one of --family")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the random one")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", default=",".join(SIDES), help="those to run, of all")
    parser.add_argument("--fsync", action="store_true", help="have every side that writes wait for the disk")
    parser.add_argument("--check", action="store_true", help=f"fail below {TARGET} of the plain speed")
    parser.add_argument("--out", default="runs/loading", help="folder of the results; must not exist")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    if out.exists():
        sys.exit(f"--out={args.out}: exists already; name another folder")
    out.mkdir(parents=True)
    if not args.model:
        size = int(args.gib * 2**30)
        kind = FAMILIES[args.family] | dict(dtype=args.dtype)
        host_memory.write_checkpoint(out / "model", width=args.width, target_bytes=size, **kind)
    args.model = str(Path(args.model or out / "model").absolute())
    args.total = sum(len(path.read_bytes()) for path in weight_files(args))
    found = compare(run(out, args), args.total)
    common.write_results(out, args, found)
    print(
        f"checkpoint: {common.shown(common.mib(args.total))} MiB in {len(weight_files(args))} files, in the page cache"
    )
    print(common.table(rows_of(found)))
    slow = below(found["ratios"])
    sys.exit("; ".join(slow) if args.check and slow else 0)


def run(out: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every side in turn, as many times as there are rounds."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides.split(",")}
    for number in range(args.rounds):
        for side, rounds in results.items():
            work = out / f"{side}-{number}"
            rounds.append(common.in_fresh_process(f"benchmarks.loading:{side}", work, vars(args)))
            if "failed" in rounds[-1]:
                sys.exit(f"{side}: {rounds[-1]['failed']}")
    return results


if __name__ == "__main__":
    main()
