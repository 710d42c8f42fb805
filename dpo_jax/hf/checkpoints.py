"""Loads Hugging Face checkpoints into our parameters, and exports parameters as Hugging Face folders.

A folder is read without torch, without unpickling and without running code that came with it. An export has the
tensor names of the checkpoint it came from, so programs that read the one read the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.hf import folders, tensors, transpose
from dpo_jax.hf.families import family
from dpo_jax.hf.folders import ONE_HOST, Hosts, Index, Weights, resolve
from dpo_jax.hf.tensors import FLOATS, Bound
from dpo_jax.models.config import DecoderConfig
from dpo_jax.runtime import files
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.prefetch import in_order
from dpo_jax.runtime.terminal import passes
from dpo_jax.trees import flatten, nest
from dpo_jax.types import InputError, listed

__all__ = [
    "Hosts",
    "WriteOptions",
    "check_weights",
    "digest",
    "export",
    "load_params",
    "read_config",
    "resolve",
    "save_new",
]

VOCABULARY = {"embed/embedding", "head/embedding"}  # leaves with a row for each token
DTYPES = ("float32", "bfloat16", "float16")  # that parameters and exports may have

Array = np.ndarray | jax.Array
Read = Callable[[Index], np.ndarray]  # reads part of a leaf from the checkpoint
Place = Callable[[str, tuple[int, ...], Read], object]  # (path, shape, read) -> the leaf; see `load_params`


class WriteOptions(NamedTuple):
    """How weights are written to a folder, and which files go along with them.

    dtype: one of DTYPES; empty: each tensor as it is in the base checkpoint, float32 where there is none.
    tokenizer: folder whose tokenizer and chat templates are copied; None: those of the base checkpoint, if any.
    card: text of README.md; empty: none.
    max_shard_bytes: size from which weights are split into numbered files.
    hosts: the processes that share the writing.
    """

    dtype: str = ""
    tokenizer: Path | None = None
    card: str = ""
    max_shard_bytes: int = 5_000_000_000
    hosts: Hosts = ONE_HOST


DEFAULT = WriteOptions()


class LeafSource(NamedTuple):
    """A leaf of the parameters and the tensors of a checkpoint that hold its numbers."""

    path: str  # such as blocks/mlp/up/kernel
    shape: tuple[int, ...]
    dtype: str  # that it is read as
    tensors: list[Bound]  # that fill it, or repeat what fills it
    checkpoint: str  # for errors


def whole(path: str, shape: tuple[int, ...], read: Read) -> np.ndarray:
    """Returns the whole leaf as a numpy array."""
    return read(tuple(slice(0, size) for size in shape))


def read_config(folder: Path) -> tuple[DecoderConfig, dict]:
    """Returns the architecture that a folder's `config.json` describes, and the file's content.

    Raises: InputError if the family is unknown, or a field asks for something that is not implemented.
    """
    path = folder / folders.CONFIG
    if not path.is_file() and (folder / folders.ADAPTER_CONFIG).is_file():
        base = folders.read_json(folder / folders.ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(
            str(folder),
            got="an adapter without its model",
            expected="a model",
            remedy=f"Give --config.lora.path={folder} --config.model.path={base or 'MODEL'}.",
        )
    hf = folders.read_json(path)
    return family(hf, str(path)).decoder_config(hf, str(path)), hf


def check_weights(folder: Path, config: DecoderConfig) -> None:
    """Raises InputError unless the weights are the tensors that `config.json` describes, by names and shapes alone."""
    table, skipped = family_table(folder, config)
    with folders.open_weights(folder) as source:
        names = [name for tensor in table if {*tensor.leaves} & VOCABULARY for name in tensor.names]
        shapes = {name: source.headers[name].shape for name in names if name in source.headers}
        rows = {shape[0] for shape in shapes.values() if shape[1:] == (config.width,)}
        if len(rows) == 1 and rows != {config.vocab_size}:
            raise InputError(
                f"{folder / folders.CONFIG}: vocab_size",
                got=f"got {config.vocab_size}, and {', '.join(f'{name} is {[*shapes[name]]}' for name in shapes)}",
                expected="as many as the embeddings have rows",
                remedy=f"Set it to {rows.pop()} there, as resize_token_embeddings and save_pretrained do.",
            )
        tensors.bind(table, config.stacks, source.headers, skipped=skipped, place=str(folder))


def load_params(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    place: Place = whole,
    only: Callable[[str], bool] = lambda leaf: True,
) -> dict:
    """Reads a checkpoint into the parameter tree that `DecoderConfig` documents.

    Args:
      config: from `read_config` of the same folder.
      dtype: of every leaf; one of DTYPES.
      only: decides by a leaf's path whether it is read; the tree has no others.
      place: called for each leaf with its path, such as blocks/mlp/up/kernel, its shape, and `read`; it returns the
        leaf of the result. `read(index)`, valid until `place` returns, takes a slice for each axis and reads that
        part of the leaf, and little more than that part of the files. With jax.make_array_from_callback(shape,
        sharding, read) each host reads the parts on its own devices (once for each device: a part that is replicated
        on several is read several times).
    Raises: InputError naming every missing, unexpected and misshapen tensor before any is read; if the weights are
      not safetensors; if a number is too large for `dtype`; or if embeddings are tied and the file has another head,
      which is found by a host that reads where they differ.
    """
    check_dtype(dtype, str(folder))
    table, skipped = family_table(folder, config)
    return nest(load_leaves(folder, table, config.stacks, skipped=skipped, dtype=dtype, place=place, only=only))


def load_leaves(
    path: Path,
    table: Sequence[tensors.Tensor],
    sizes: tensors.Sizes,
    *,
    skipped: str,
    dtype: str,
    place: Place,
    only: Callable[[str], bool] = lambda leaf: True,
) -> dict:
    """Reads the leaves of a table of tensors, by path, from a folder or one safetensors file; see `load_params`."""
    shapes = {leaf: shape for leaf, shape in tensors.leaf_shapes(table, sizes).items() if only(leaf)}
    bytes_of = {leaf: folders.Spec(leaf, dtype, shape).bytes for leaf, shape in shapes.items()}
    leaves = {}
    with (
        folders.open_weights(path) as source,
        transpose.pool() as threads,
        passes(sum(bytes_of.values()), "weights", unit="bytes") as progress,
    ):
        bound = tensors.bind(table, sizes, source.headers, skipped=skipped, place=str(path))
        for leaf, shape in shapes.items():
            filling = [b for b in bound if leaf in b.tensor.leaves]
            origin = LeafSource(leaf, shape, dtype, filling, str(path))
            leaves[leaf] = place(leaf, shape, functools.partial(read_part, source, threads, origin))
            progress.add(bytes_of[leaf])
    return leaves


def read_part(source: Weights, threads: Executor, leaf: LeafSource, index: Index) -> np.ndarray:
    """Returns part `index` of a leaf, read from the checkpoint.

    Each thread reads whole tensors, one of each layer, or rows of one that has no layers, so no two write to the same
    part of the result.
    """
    # An array without storage (all strides 0) has the shape sliced as the real one would be.
    result = np.empty(np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)[index].shape, leaf.dtype)
    by_place = {(b.at, b.tensor.repeats): b for b in leaf.tensors}
    stacked = len(leaf.tensors[0].at)
    within = index[stacked:]
    numbered = [list(enumerate(range(size)[part])) for size, part in zip(leaf.shape, index[:stacked], strict=False)]
    jobs = []
    for each in itertools.product(*numbered):
        into, at = tuple(i for i, _ in each), tuple(number for _, number in each)
        b, repeat = by_place[at, False], by_place.get((at, True))
        for rows, part in [(..., within)] if stacked else runs_of_rows(within, leaf.shape[0]):
            jobs.append(functools.partial(fill, result[(*into, rows)], source, b, leaf, part))
            if repeat:
                jobs.append(functools.partial(check_repeat, source, b, repeat, leaf, part))
    for _ in in_order(threads, jobs, ahead=transpose.THREADS):
        pass
    return result


def runs_of_rows(index: Index, rows: int) -> Iterator[tuple[slice, Index]]:
    """Splits a part of an array along its rows, one run for each thread.

    Yields: the rows of the part that a run fills, and the run's index in the array.
    """
    start, stop, _ = index[0].indices(rows)
    step = max(1, -(-(stop - start) // transpose.THREADS))
    for at in range(start, stop, step):
        run = slice(at, min(at + step, stop))
        yield slice(run.start - start, run.stop - start), (run, *index[1:])


def fill(into: np.ndarray, source: Weights, bound: Bound, leaf: LeafSource, index: Index) -> None:
    """Reads part `index` of a leaf, or of one layer of it, into an array of any type."""
    for piece, numbers in source.pieces(bound.name, viewer(bound, leaf.path, index)):
        same_type = transpose.cast(numbers, into.dtype.name, f"{leaf.checkpoint}: {bound.name}")
        transpose.copy(same_type, into[(*piece, ...)])


def viewer(bound: Bound, leaf: str, index: Index) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from a tensor to the view of it that is part `index` of a leaf, or of one layer of it."""
    return lambda tensor: bound.tensor.to_leaves(tensor)[bound.tensor.leaves.index(leaf)][index]


def check_repeat(source: Weights, one: Bound, repeat: Bound, leaf: LeafSource, index: Index) -> None:
    """Raises InputError unless two tied tensors hold the same numbers for part `index` of a leaf."""
    view = viewer(repeat, leaf.path, index)
    for piece, numbers in source.pieces(one.name, viewer(one, leaf.path, index)):
        for within, repeated in source.pieces(repeat.name, lambda tensor, piece=piece: view(tensor)[piece]):
            if not np.array_equal(numbers[within], repeated):
                raise InputError(
                    f"{leaf.checkpoint}: {repeat.name}",
                    got=f"differs from {one.name}, and config.json has tie_word_embeddings",
                    expected="the same numbers, or no such tensor",
                    remedy="If the head was trained apart, set tie_word_embeddings to false in config.json; if not, "
                    "remove it.",
                )


def digest(
    folder: Path,
    *,
    mine: Callable[[list[str]], Sequence[str]] = lambda names: names,
    gather: Callable[[dict[str, str]], Mapping[str, str]] = lambda part: part,
) -> str:
    """Returns a 128-bit hash, in hexadecimal, of a model's architecture and weights.

    It hashes the hashes of the tensors (name, type, shape, bytes) in order of their names. Numbered files, buffers and
    fields of `config.json` that change nothing do not alter it.

    Args:
      mine: selects, from the names of all tensors, the ones that this host reads; together the hosts must read all.
        The longest tensors come first, so every n-th of them is a fair share for n hosts.
      gather: merges the hashes by name that each host computed into one mapping, equal on all hosts.
    """
    config, _ = read_config(folder)
    table, skipped = family_table(folder, config)
    # Fields at their defaults are left out, so that a field added later leaves the digests of old models alone.
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    with folders.open_weights(folder) as source:
        tensors.bind(table, config.stacks, source.headers, skipped=skipped, place=str(folder))
        names = sorted(name for name in source.headers if not re.fullmatch(skipped, name))
        by_length = sorted(names, key=lambda name: -math.prod(source.headers[name].shape))
        hashes = gather(tensor_digests(source, mine(by_length)))
    lines = [json.dumps(fields, sort_keys=True), *(f"{name} {hashes[name]}" for name in names)]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def tensor_digests(source: Weights, names: Sequence[str]) -> dict[str, str]:
    """Returns the digests of tensors by their names, and shows the progress of reading them."""
    digests = {}
    specs = ((name, source.headers[name]) for name in names)
    sizes = {name: folders.Spec(name, FLOATS[header.dtype], header.shape).bytes for name, header in specs}
    with passes(sum(sizes.values()), "digest of weights", unit="bytes") as progress:
        for name in names:
            digests[name] = tensor_digest(source, name)
            progress.add(sizes[name])
    return digests


def tensor_digest(source: Weights, name: str) -> str:
    """Returns a 128-bit hash, in hexadecimal, of one tensor's name, type, shape and bytes."""
    header = source.headers[name]
    state = xxhash.xxh3_128(f"{name} {header.dtype} {list(header.shape)}\n".encode())
    for _, numbers in source.pieces(name, lambda tensor: tensor.reshape(-1)):
        state.update(numbers.view(np.uint8).data)
    return state.hexdigest()


def export(params: Mapping, *, base: Path, out: Path, options: WriteOptions = DEFAULT) -> None:
    """Writes parameters as a Hugging Face folder with the tensor names and configuration of `base`.

    Unchanged parameters of `base` come out bit for bit.

    Args:
      params: the tree that `DecoderConfig` documents, of numpy or jax arrays; brought to the host one layer's tensor
        at a time. Arrays sharded over devices of several processes must have a NamedSharding.
      out: replaced if it is an earlier export, and only once the new one is complete.
      options: where `hosts` are many, all of them call this with the same arguments and a file system in common.
        `out` is in place once host 0 returns.
    Raises: InputError if `out` holds anything that an export does not write, if `params` do not fit `base`, or if a
      number is too large for its type. `out` is then as it was.
    """
    config, hf = read_config(base)
    table, skipped = family_table(base, config)
    with folders.open_weights(base) as source:
        bound = tensors.bind(table, config.stacks, source.headers, skipped=skipped, place=str(base))
        dtypes = {b.name: FLOATS[source.headers[b.name].dtype] for b in bound}
    if options.dtype:
        check_dtype(options.dtype, str(out))
        dtypes, hf = dict.fromkeys(dtypes, options.dtype), with_dtype(hf, options.dtype)
    if files.resolved(out) in map(files.resolved, (base, options.tokenizer or base)):
        raise InputError(
            str(out), got="is also the folder read from", expected="another folder", remedy="Choose a new name."
        )
    leaves = fitting(params, tensors.leaf_shapes(table, config.stacks))
    folders.check_replaceable(out)
    check_tokenizer(options.tokenizer)
    with folders.replacing(out, options.hosts, (folders.CONFIG, hf)) as new:
        if options.hosts.index == 0:
            if (base / folders.GENERATION).is_file():
                files.write_bytes(new / folders.GENERATION, (base / folders.GENERATION).read_bytes())
            write_companions(new, tokenizer=options.tokenizer or base, card=options.card)
        write_tensors(new, leaves, bound, dtypes, options)


def save_new(params: Mapping, *, hf_config: Mapping, out: Path, options: WriteOptions = DEFAULT) -> None:
    """Writes parameters that come from no checkpoint as a Hugging Face folder.

    Args:
      hf_config: contents of its `config.json`, with `model_type`; the class and type of the weights are filled in.
      params, out, options: as for `export`; by one host.
    """
    dtype = options.dtype or "float32"
    hf = {"architectures": [family(dict(hf_config), "hf_config").architecture]} | with_dtype(hf_config, dtype)
    config = family(hf, "hf_config").decoder_config(hf, "hf_config")
    check_dtype(dtype, str(out))
    table = family(hf, "hf_config").tensors(config)
    bound = tensors.all_names(table, config.stacks)
    leaves = fitting(params, tensors.leaf_shapes(table, config.stacks))
    folders.check_replaceable(out)
    check_tokenizer(options.tokenizer)
    assert options.hosts.count == 1, "one host alone"
    with folders.replacing(out, ONE_HOST, (folders.CONFIG, hf)) as new:
        write_companions(new, tokenizer=options.tokenizer, card=options.card)
        write_tensors(new, leaves, bound, {b.name: dtype for b in bound}, options)


def write_companions(new: Path, *, tokenizer: Path | None, card: str) -> None:
    """Copies the tokenizer and writes the model card."""
    if tokenizer:
        for name in folders.tokenizer_files(tokenizer):
            files.write_pieces(new / name, [(tokenizer / name).read_bytes()])
    if card:
        files.write_text(new / "README.md", card)


def write_tensors(
    new: Path,
    leaves: Mapping[str, Array],
    bound: list[Bound],
    dtypes: Mapping[str, str],
    options: WriteOptions,
    *,
    stem: str = "model",
) -> None:
    """Writes the weights to STEM.safetensors, or to numbered files.

    Args:
      dtypes: numpy's name of the type of each tensor, by the tensor's name.
    """
    by_name = {b.name: b for b in bound}

    def build(name: str) -> Callable[[], np.ndarray]:
        _, tensor, at = by_name[name]
        # Sliced before it leaves the device, so the host sees one layer of a stacked leaf at a time.
        arrays = [within_reach(leaves[leaf], at) for leaf in tensor.leaves]
        return lambda: tensor.to_tensor(*map(np.asarray, arrays))

    specs = [folders.Spec(b.name, dtypes[b.name], b.tensor.shape) for b in bound]
    folders.write_weights(new, specs, build, max_shard_bytes=options.max_shard_bytes, hosts=options.hosts, stem=stem)


def within_reach(array: Array, at: tuple[int, ...]) -> Array:
    """Returns part `at` of an array's leading axes, replicated if other processes hold a shard of it.

    This process can then read all of it. Every process must take part.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array[at] if at else array
    assert isinstance(array.sharding, NamedSharding), array.sharding
    copied = copier(array.sharding.mesh)(array, at).addressable_data(0)
    # A host with nothing to write would run ahead otherwise, and fill the devices with copies that wait for the others.
    return jax.block_until_ready(copied)


@functools.cache
def copier(mesh: Mesh) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Returns a program that replicates a part of an array's leading axes, or all of it, over the mesh."""

    def copy(array: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:  # traced: one compilation serves all layers
        return array[at] if at else array

    return jax.jit(copy, out_shardings=NamedSharding(mesh, PartitionSpec()))


def family_table(folder: Path, config: DecoderConfig) -> tuple[list[tensors.Tensor], str]:
    """Returns the tensors that a folder's family stores for `config`, and the pattern of those to skip."""
    path = folder / folders.CONFIG
    kind = family(folders.read_json(path), str(path))
    return kind.tensors(config), kind.skipped


def check_dtype(dtype: str, place: str) -> None:
    """Raises InputError unless `dtype` is one of DTYPES."""
    if dtype not in DTYPES:
        raise InputError(place, got=f"got dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}", remedy="Set one.")


def check_tokenizer(folder: Path | None) -> None:
    """Raises InputError if a folder has no tokenizer; None passes."""
    if folder and not folders.tokenizer_files(folder):
        raise InputError(
            str(folder),
            got="no tokenizer files",
            expected=f"some of {listed(folders.TOKENIZER_FILES)}",
            remedy="Save the tokenizer there with its save_pretrained, or give --config.tokenizer.path=FOLDER.",
        )


def with_dtype(hf: Mapping, dtype: str) -> dict:
    """Returns a configuration with another type of weights, under the keys it has (transformers 5 renamed it)."""
    keys = [key for key in ("torch_dtype", "dtype") if key in hf] or ["torch_dtype"]
    return dict(hf) | dict.fromkeys(keys, dtype)


def fitting(params: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Returns the leaves of `params` by path. Raises InputError unless they have exactly these paths and shapes."""
    leaves = flatten(params)
    problems = (
        [f"missing {path} {[*shapes[path]]}" for path in sorted(shapes.keys() - leaves.keys())],
        [f"unexpected {path}" for path in sorted(leaves.keys() - shapes.keys())],
        [
            f"{path} is {[*leaves[path].shape]}, not {[*shapes[path]]}"
            for path in sorted(shapes.keys() & leaves.keys())
            if tuple(leaves[path].shape) != shapes[path]
        ],
    )
    if any(problems):
        raise InputError(
            "params",
            got="; ".join(listed(each, separator="; ") for each in problems if each),
            expected="the leaves that config.json describes",
            remedy="Export into the architecture that was trained.",
        )
    return leaves
