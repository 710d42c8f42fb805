"""Hugging Face folders in and out: configuration and weights to our parameters, and back.

A folder is read without torch, without unpickling and without running code that came with it. What is written has
the tensor names of the checkpoint it came from, so whatever reads that one reads this.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from dpo_jax.models import hf_files, weights
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import family
from dpo_jax.models.hf_files import resolve
from dpo_jax.models.weights import FLOATS, Bound
from dpo_jax.types import InputError

__all__ = ["digest", "export", "load_params", "read_config", "resolve", "save_new"]

DTYPES = ("float32", "bfloat16", "float16")  # that parameters and exports may have


def read_config(folder: Path) -> tuple[DecoderConfig, dict]:
    """The architecture in a folder's `config.json`, and the whole file as it stands.

    Raises: InputError if the family is unknown, or any field asks for what is not implemented.
    """
    path = folder / hf_files.CONFIG
    hf = hf_files.read_json(path)
    return family(hf, str(path)).decoder_config(hf, str(path)), hf


def load_params(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> dict:
    """Reads a checkpoint into the tree that `DecoderConfig` documents.

    Args:
      config: from `read_config` of the same folder.
      dtype: of every leaf; one of DTYPES.
      put: called with the path of each leaf, such as blocks/mlp/up/kernel, and its array as soon as that is complete;
        what it returns stands in the result. Where it moves leaves to devices, the host never holds the whole model.
    Raises: InputError naming every missing, unexpected and misshapen tensor; if the weights are not safetensors; if a
      number is too large for `dtype`; or if embeddings are tied and the file has another head.
    """
    check_dtype(dtype, str(folder))
    table, skipped = family_table(folder, config)
    shapes = weights.leaf_shapes(table, config.layers)
    leaves: dict[str, Any] = {}
    with hf_files.open_weights(folder) as source:
        bound = weights.bind(table, config.layers, source.headers, skipped=skipped, place=str(folder))
        by_leaf = {b.tensor.leaves[0]: b.name for b in bound if not b.tensor.repeats}
        for tensor, group in itertools.groupby(bound, key=lambda b: b.tensor):
            if tensor.repeats:
                for b in group:
                    check_repeat(source.read, b.name, by_leaf[tensor.leaves[0]], str(folder))
                continue
            arrays = [np.empty(shapes[leaf], dtype) for leaf in tensor.leaves]
            for b in group:
                fill(arrays, b, source.read(b.name), f"{folder}: {b.name}")
            for leaf in tensor.leaves:
                leaves[leaf] = put(leaf, arrays.pop(0))
    return nest(leaves)


def fill(arrays: list[np.ndarray], bound: Bound, tensor: np.ndarray, place: str) -> None:
    """Writes one tensor's numbers into the leaves it belongs to, at its layer."""
    at = ... if bound.layer is None else bound.layer
    for array, part in zip(arrays, bound.tensor.to_leaves(tensor), strict=True):
        array[at] = cast(part, array.dtype.name, place)


def digest(folder: Path) -> str:
    """A 128-bit hash, in hexadecimal, of all that decides what a model computes: its architecture and its weights.

    Covers each tensor's name, type, shape and bytes in order of names, so neither the sharding nor buffers nor
    fields of `config.json` that change nothing alter it.
    """
    config, _ = read_config(folder)
    table, skipped = family_table(folder, config)
    # Fields at their defaults are left out, so that a field added later leaves the digests of old models alone.
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    state = xxhash.xxh3_128(json.dumps(fields, sort_keys=True).encode())
    with hf_files.open_weights(folder) as source:
        weights.bind(table, config.layers, source.headers, skipped=skipped, place=str(folder))
        for name, header in sorted(source.headers.items()):
            if not re.fullmatch(skipped, name):
                state.update(f"\n{name} {header.dtype} {list(header.shape)}\n".encode())
                state.update(np.ascontiguousarray(source.read(name)).view(np.uint8).data)
    return state.hexdigest()


def export(
    params: Mapping,
    *,
    base: Path,
    out: Path,
    dtype: str = "",
    tokenizer: Path | None = None,
    card: str = "",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters as a Hugging Face folder with the tensor names and configuration of `base`.

    Parameters that were loaded from `base` and left alone come out bit for bit.

    Args:
      params: the tree that `DecoderConfig` documents, of numpy or addressable jax arrays; brought to the host one
        layer's tensor at a time.
      out: replaced if it is an earlier export, and only once the new one is complete.
      dtype: one of DTYPES; empty: each tensor as it is in `base`.
      tokenizer: folder whose tokenizer and chat templates go along; None: `base`.
      card: text of README.md; empty: none.
    Raises: InputError if `out` holds anything that an export does not write, if `params` do not fit `base`, or if a
      number is too large for its type. `out` is then as it was.
    """
    config, hf = read_config(base)
    table, skipped = family_table(base, config)
    with hf_files.open_weights(base) as source:
        bound = weights.bind(table, config.layers, source.headers, skipped=skipped, place=str(base))
        dtypes = {b.name: FLOATS[source.headers[b.name].dtype] for b in bound}
    if dtype:
        check_dtype(dtype, str(out))
        dtypes, hf = dict.fromkeys(dtypes, dtype), with_dtype(hf, dtype)
    if out.resolve() in (base.resolve(), (tokenizer or base).resolve()):
        raise InputError(
            str(out), got="is also the folder read from", expected="another folder", remedy="Choose a new name."
        )
    leaves = fitting(params, weights.leaf_shapes(table, config.layers))
    hf_files.check_replaceable(out)
    with hf_files.replacing(out) as new:
        write_small_files(new, hf, base=base, tokenizer=tokenizer, card=card)
        write_tensors(new, leaves, bound, dtypes, max_shard_bytes)


def save_new(
    params: Mapping,
    *,
    hf_config: Mapping,
    out: Path,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    card: str = "",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters that come from no checkpoint as a Hugging Face folder.

    Args:
      hf_config: contents of its `config.json`, with `model_type`; the class and type of the weights are filled in.
      The others: as for `export`; without `tokenizer` the folder has none.
    """
    hf = {"architectures": [family(dict(hf_config), "hf_config").architecture]} | with_dtype(hf_config, dtype)
    config = family(hf, "hf_config").decoder_config(hf, "hf_config")
    check_dtype(dtype, str(out))
    table = family(hf, "hf_config").tensors(config)
    bound = weights.all_names(table, config.layers)
    leaves = fitting(params, weights.leaf_shapes(table, config.layers))
    hf_files.check_replaceable(out)
    with hf_files.replacing(out) as new:
        write_small_files(new, hf, base=None, tokenizer=tokenizer, card=card)
        write_tensors(new, leaves, bound, {b.name: dtype for b in bound}, max_shard_bytes)


def write_small_files(new: Path, hf: Mapping, *, base: Path | None, tokenizer: Path | None, card: str) -> None:
    """Everything but the weights. Raises InputError if `tokenizer` is given and has none."""
    hf_files.write_json(new / hf_files.CONFIG, hf)
    if base and (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", new / "generation_config.json")
    source = tokenizer or base
    if source and not hf_files.copy_tokenizer(source, new) and tokenizer:
        raise InputError(
            str(tokenizer),
            got="no tokenizer files",
            expected=f"some of {', '.join(hf_files.TOKENIZER_FILES)}",
            remedy="Save the tokenizer there with its save_pretrained.",
        )
    if card:
        (new / "README.md").write_text(card, encoding="utf-8")


def write_tensors(
    new: Path, leaves: Mapping, bound: list[Bound], dtypes: Mapping[str, str], max_shard_bytes: int
) -> None:
    """The weights, in as many files as it takes."""
    by_name = {b.name: b for b in bound}

    def build(name: str) -> np.ndarray:
        _, tensor, layer = by_name[name]
        # Sliced before it leaves the device, so the host sees one layer of a stacked leaf at a time.
        arrays = [np.asarray(leaves[leaf] if layer is None else leaves[leaf][layer]) for leaf in tensor.leaves]
        return cast(tensor.to_tensor(*arrays), dtypes[name], name)

    specs = [hf_files.Spec(b.name, dtypes[b.name], b.tensor.shape) for b in bound]
    hf_files.write_weights(new, specs, build, max_shard_bytes=max_shard_bytes)


def family_table(folder: Path, config: DecoderConfig) -> tuple[list[weights.Tensor], str]:
    """The tensors that a folder's family stores for `config`, and the pattern of those to skip."""
    path = folder / hf_files.CONFIG
    found = family(hf_files.read_json(path), str(path))
    return found.tensors(config), found.skipped


def check_dtype(dtype: str, place: str) -> None:
    """Raises InputError unless `dtype` is one of DTYPES."""
    if dtype not in DTYPES:
        raise InputError(place, got=f"dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}", remedy="Set one.")


def with_dtype(hf: Mapping, dtype: str) -> dict:
    """A configuration that names another type of weights, under the keys it has (transformers 5 renamed it)."""
    keys = [key for key in ("torch_dtype", "dtype") if key in hf] or ["torch_dtype"]
    return dict(hf) | dict.fromkeys(keys, dtype)


def check_repeat(read: Callable[[str], np.ndarray], name: str, other: str, place: str) -> None:
    """Raises InputError unless the two tensors are equal, as tied ones must be."""
    if not np.array_equal(read(name), read(other)):
        raise InputError(
            f"{place}: {name}",
            got=f"differs from {other}, and config.json has tie_word_embeddings",
            expected="the same numbers, or no such tensor",
            remedy="If the head was trained apart, set tie_word_embeddings to false in config.json; if not, remove it.",
        )


def cast(array: np.ndarray, dtype: str, place: str) -> np.ndarray:
    """`array` as `dtype`, without a copy where it has it already. Raises InputError if a finite number overflows."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    narrower = ml_dtypes.finfo(result.dtype).max < ml_dtypes.finfo(array.dtype).max
    if narrower and np.any(np.isfinite(array) & ~np.isfinite(result)):
        raise InputError(
            place,
            got=f"holds numbers beyond the range of {dtype}",
            expected=f"magnitudes up to {float(ml_dtypes.finfo(result.dtype).max):.3g}",
            remedy="Use bfloat16 or float32.",
        )
    return result


def nest(leaves: Mapping[str, Any]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def fitting(params: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The leaves of `params` by path. Raises InputError unless they are exactly `shapes`."""
    leaves = flatten(params)
    problems = [f"missing {path} {list(shapes[path])}" for path in sorted(shapes.keys() - leaves.keys())]
    problems += [f"unexpected {path}" for path in sorted(leaves.keys() - shapes.keys())]
    problems += [
        f"{path} is {list(leaves[path].shape)}, not {list(shapes[path])}"
        for path in sorted(shapes.keys() & leaves.keys())
        if tuple(leaves[path].shape) != shapes[path]
    ]
    if problems:
        raise InputError(
            "params",
            got="; ".join(problems),
            expected="the leaves that config.json describes",
            remedy="Export into the architecture that was trained.",
        )
    return leaves
