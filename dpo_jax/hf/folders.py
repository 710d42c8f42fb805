"""Hugging Face folders: finds and downloads them, reads and writes their safetensors and small files.

Nothing here unpickles or runs code that came with a model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import huggingface_hub
import ml_dtypes  # noqa: F401  gives numpy its bfloat16
import numpy as np
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from dpo_jax.hf import transpose
from dpo_jax.hf.tensors import FLOATS, Header
from dpo_jax.runtime import files, reading
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.prefetch import in_order
from dpo_jax.runtime.reading import Ranges
from dpo_jax.runtime.terminal import passes
from dpo_jax.types import InputError, listed

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's names, this and the next
ADAPTER = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"  # named chat templates beside the default one
# All files besides weights that a download may bring and an export may write. No *.bin, no *.py.
SMALL_FILES = (CONFIG, GENERATION, INDEX, ADAPTER_CONFIG, ADAPTER, *TOKENIZER_FILES)
FOREIGN = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".msgpack", ".h5")  # weights that are not read

MOST_HEADER = 100_000_000  # bytes, as in the safetensors library

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Index = tuple[slice, ...]  # of part of an array, as in jax.make_array_from_callback


class Weights(NamedTuple):
    """An open checkpoint: the types and shapes of its tensors, and a function that reads them.

    `pieces(name, view)` yields the numbers of `view(tensor)` in pieces, in the order of the file, each with its index
    in that view; `view` only slices, reshapes and transposes. No other parts of the file are read, except for gaps
    that would be slower to skip. Several threads may read at once.
    """

    headers: dict[str, Header]
    pieces: Callable[[str, Callable[[np.ndarray], np.ndarray]], Iterator[tuple[Index, np.ndarray]]]


class Hosts(NamedTuple):
    """One of the processes that share a job, and how it waits for the others."""

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda name: None  # returns once every host has called it with this name


ONE_HOST = Hosts()


class Spec(NamedTuple):
    """Name, type and shape of a tensor to be written."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def resolve(path: str | Path, field: str = "") -> Path:
    """Returns a folder, on disk or in a bucket, as it is, or downloads the snapshot of a Hub id such as owner/name.

    Args:
      field: name of the setting that names it, for errors.
    Raises: InputError if `path` is neither.
    """
    folder = files.path(path, field)
    if folder.is_dir():
        return folder
    reason = "no such folder"
    if HUB_ID.fullmatch(str(path)):
        patterns = ["model*.safetensors", *SMALL_FILES, f"{TEMPLATE_FOLDER}/*.jinja"]
        try:
            return files.path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
        except (OSError, ValueError) as error:  # every Hub and connection error is one of these
            reason = f"no such folder, and the Hub answered: {_answer(error)}"
    raise InputError(
        field or str(path),
        got=f"{f'{str(path)!r}, ' * bool(field)}{reason}",
        expected="a folder that transformers or PEFT saved, or its id on the Hub",
        remedy="Check the spelling; gated models need `hf auth login` first.",
    )


@functools.cache
def config_file(path: str, field: str) -> Path:
    """Returns the config.json in a local folder, or downloads that one file of a Hub id.

    Args:
      field: name of the setting that names it, for errors.
    Raises: InputError if there is none.
    """
    file = files.path(path, field) / CONFIG
    if file.is_file():
        return file
    reason = f"{path!r}, no folder with a {CONFIG}"
    if HUB_ID.fullmatch(path) and not file.parent.is_dir():
        try:
            return files.path(huggingface_hub.hf_hub_download(path, CONFIG))
        except (OSError, ValueError) as error:  # every Hub and connection error is one of these
            reason = f"{path!r}, no such folder, and the Hub answered: {_answer(error)}"
    raise InputError(
        field,
        got=reason,
        expected=f"a folder or Hub id with a {CONFIG}",
        remedy="Check the spelling; gated models need `hf auth login` or HF_TOKEN.",
    )


def _answer(error: Exception) -> str:
    """Returns what an error of huggingface_hub says, in a few words where it is a usual one."""
    usual = {
        errors.GatedRepoError: "the model is gated, and not open to this token",
        errors.RepositoryNotFoundError: "there is no such model, or it is private and not open to this token",
        errors.RemoteEntryNotFoundError: "the model does not have this file",
        errors.LocalEntryNotFoundError: "nothing; it cannot be reached, and the file is not in the cache",
    }
    return next((said for kind, said in usual.items() if isinstance(error, kind)), " ".join(str(error).split()))


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file. Raises InputError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kinds = {list: "list", str: "string", bool: "true or false", type(None): "null"}
        reason = "" if isinstance(value, dict) else f"a JSON {kinds.get(type(value), 'number')}"
    except FileNotFoundError:
        value, reason = {}, "no such file"
    except OSError as error:
        value, reason = {}, f"cannot be read ({error})"
    except ValueError as error:
        value, reason = {}, f"not JSON: {error}"
    if reason:
        raise InputError(
            str(path), got=reason, expected="a JSON object", remedy="Is this a folder that transformers saved?"
        )
    return value


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint. Raises InputError if there are none or one is missing."""
    if folder.suffix == ".safetensors" and folder.is_file():
        return [folder]
    if (folder / SINGLE).is_file():  # transformers, too, prefers it to an index
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise no_weights(folder)
    weight_map = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    # Only plain names: an index must not reach outside its folder.
    absent = [name for name in names if PurePosixPath(name).name != name or not (folder / name).is_file()]
    if absent or not names:
        raise InputError(
            str(folder / INDEX),
            got=f"names files that are not in the folder: {listed(absent)}" if absent else "names no files",
            expected="every file of the checkpoint",
            remedy="Download or copy the missing files.",
        )
    return [folder / name for name in names]


def no_weights(folder: Path) -> InputError:
    """Returns the error for a folder without the safetensors of a model: with the weights that it has instead."""
    kinds = {suffix: sorted(path.name for path in folder.glob(f"*{suffix}")) for suffix in FOREIGN}
    found = [name for names in kinds.values() for name in names]
    remedy = "Download the model again; *.safetensors may be missing."
    if kinds[".safetensors"]:
        remedy = f"Rename a single file to {SINGLE}; several need {INDEX}, which transformers writes along with them."
    elif found:
        remedy = (
            "Pickle files can run code and are never read, nor are other formats. Where torch is installed, convert: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
        if kinds[".gguf"]:
            remedy += " For GGUF, from_pretrained takes gguf_file=NAME."
    return InputError(
        str(folder),
        got=f"no weights under these names, but {listed(found)}" if found else "no weights",
        expected=f"{SINGLE} or {INDEX}",
        remedy=remedy,
    )


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Opens a checkpoint's safetensors, in a folder or one file; numbers are read only by `Weights.pieces`.

    Raises: InputError if a file is damaged, or two files hold the same tensor.
    """
    with contextlib.ExitStack() as stack:
        headers: dict[str, Header] = {}
        homes: dict[str, tuple[Ranges, int]] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(Ranges(path))
                text = checked_header(file)
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(
                    str(path),
                    got=f"damaged or not readable ({error})",
                    expected="a safetensors file",
                    remedy="Download it again.",
                ) from error
            for name, entry in json.loads(text).items():
                if name == "__metadata__":
                    continue
                if name in homes:
                    raise InputError(
                        str(path),
                        got=f"the tensor {name}, which another file has too",
                        expected="each tensor in one file",
                        remedy="Download the model again, into an empty folder.",
                    )
                headers[name] = Header(entry["dtype"], tuple(entry["shape"]))
                homes[name] = file, 8 + len(text) + entry["data_offsets"][0]
        yield Weights(headers, lambda name, view: read_pieces(*homes[name], headers[name], view))


def checked_header(file: Ranges) -> bytes:
    """Returns the JSON header of a safetensors file. Raises: SafetensorError if the library would refuse the file.

    The library reads files on disk alone, so it gets one with the same header and length, and no numbers: a hole, which
    takes no room.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size, MOST_HEADER):
        raise ValueError(f"a header of {length:,} bytes in a file of {file.size:,}")
    text = file.read(8, length)
    with tempfile.NamedTemporaryFile() as same:
        same.write(struct.pack("<Q", length) + text)
        same.truncate(file.size)
        with safe_open(same.name, framework="numpy"):
            return text


def read_pieces(
    file: Ranges, begin: int, header: Header, view: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[Index, np.ndarray]]:
    """Yields `Weights.pieces` of the tensor whose numbers begin at byte `begin`.

    An array of the tensor's shape is made and never filled (memory that is not touched takes no room). A view of it
    has the layout that the numbers have in the file, so its address and strides tell where to read. The view is halved
    along the axis of the longest stride until a piece has no gaps, or is so short that they do not matter.
    """
    tensor = np.empty(header.shape, FLOATS[header.dtype])
    whole = view(tensor)
    assert not whole.size or np.may_share_memory(whole, tensor), "not a view but a copy"
    todo = [tuple(slice(0, size) for size in whole.shape)] if whole.size else []
    while todo:
        index = todo.pop()
        part = whole[(*index, ...)]  # with the dots even a single number stays an array
        span = part.itemsize + sum((size - 1) * stride for size, stride in zip(part.shape, part.strides, strict=True))
        if part.size > 1 and span > (file.piece if span == part.nbytes else file.gap):
            _, axis = max((stride, i) for i, stride in enumerate(part.strides) if part.shape[i] > 1)
            start, stop = index[axis].start, index[axis].stop
            middle = (start + stop) // 2
            todo += [(*index[:axis], half, *index[axis + 1 :]) for half in (slice(middle, stop), slice(start, middle))]
        else:
            numbers = read_bytes(file, begin + part.ctypes.data - tensor.ctypes.data, span)
            yield index, np.ndarray(part.shape, part.dtype, numbers, strides=part.strides)


def read_bytes(file: Ranges, start: int, count: int) -> bytes:
    """Reads `count` bytes from byte `start`. Raises InputError if the file has become shorter."""
    content = b""
    while len(content) < count:  # runs once, except for reads that are interrupted or of 2 GiB and more
        more = file.read(start + len(content), count - len(content))
        content = content + more if content else more
        if not more:
            raise InputError(
                str(file.path),
                got=f"ends at byte {start + len(content)}",
                expected=f"{start + count} bytes or more",
                remedy="It was truncated while being read; download it again.",
            )
    return content


def write_weights(
    folder: Path,
    specs: Sequence[Spec],
    build: Callable[[str], Callable[[], np.ndarray]],
    *,
    max_shard_bytes: int,
    hosts: Hosts,
    stem: str = "model",
) -> None:
    """Writes STEM.safetensors, or numbered files and their index where it would exceed `max_shard_bytes`.

    The hosts take turns: each file is written by one of them. `build(name)` is called on all hosts, in the same order
    and once for each tensor, just before the tensor is written. The host that writes calls the function that it
    returns, so no more than one tensor is in memory. The array may be of another type, and its axes in any order.
    """
    by_name = {spec.name: spec for spec in specs}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        {name: by_name[name].bytes for name in sorted(by_name)},
        get_storage_size=int,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for number, (filename, names) in enumerate(split.filename_to_tensors.items()):
        ordered = in_file_order([by_name[name] for name in names])
        if number % hosts.count == hosts.index:
            write_file(folder / filename, ordered, build)
        else:
            for spec in ordered:
                build(spec.name)
    if split.is_sharded and hosts.index == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.write_json(folder / INDEX, index)


def in_file_order(specs: Sequence[Spec]) -> list[Spec]:
    """Orders tensors as the safetensors library does in a file: widest types first, so that all are aligned."""
    rank = list(FLOATS.values())
    return sorted(specs, key=lambda spec: (rank.index(spec.dtype), spec.name))


def write_file(path: Path, ordered: Sequence[Spec], build: Callable[[str], Callable[[], np.ndarray]]) -> None:
    """Writes one safetensors file, byte for byte as the safetensors library does, a piece of a tensor at a time.

    The library itself needs every tensor of the file in memory at once. Layout: eight bytes of header length, a JSON
    header padded with spaces to a multiple of eight, then the numbers.
    """
    codes = {dtype: code for code, dtype in FLOATS.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.bytes
        header[spec.name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    jobs = (
        functools.partial(in_file_layout, rows, spec)
        for spec in ordered
        for rows in row_pieces(build(spec.name)(), spec)
    )
    # Threads make the next pieces while one is written. Pieces are written in order: some network file systems need it.
    with (
        path.open("wb") as file,
        transpose.pool() as threads,
        passes(end, f"writing {path.name}", unit="bytes") as progress,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in in_order(threads, jobs, ahead=transpose.THREADS):
            file.write(piece)
            progress.add(len(piece))
        assert file.tell() == 8 + len(text) + end, path


def row_pieces(array: np.ndarray, spec: Spec) -> Iterator[np.ndarray]:
    """Yields runs of rows of a tensor, each `reading.PIECE` bytes in the file, or one row."""
    assert array.shape == spec.shape, (spec.name, array.shape, spec.shape)
    array = np.atleast_1d(array)
    step = max(1, reading.PIECE * len(array) // max(1, spec.bytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def in_file_layout(rows: np.ndarray, spec: Spec) -> memoryview:
    """Returns the bytes of some rows of a tensor in the file's type and order."""
    return transpose.contiguous(transpose.cast(rows, spec.dtype, spec.name)).reshape(-1).view(np.uint8).data


def tokenizer_files(folder: Path) -> list[str]:
    """Returns the names of a folder's tokenizer and chat template files."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return names + [f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]


def check_replaceable(out: Path) -> None:
    """Raises InputError unless `out` is absent, or a folder that holds only files of an export."""
    if not out.exists():
        return
    ours = {*SMALL_FILES, "README.md", TEMPLATE_FOLDER}
    unknown = (
        [path.name for path in sorted(out.iterdir()) if not (path.name in ours or path.match("model*.safetensors"))]
        if out.is_dir()
        else [out.name]
    )
    if unknown:
        raise InputError(
            str(out),
            got=f"holds {listed(unknown)}",
            expected="a new folder, or an earlier export to replace",
            remedy="Choose another folder; this one would be deleted.",
        )


@contextlib.contextmanager
def replacing(out: Path, hosts: Hosts, config: tuple[str, Mapping]) -> Iterator[Path]:
    """Yields an empty folder, the same on all hosts, that replaces `out` once the body has succeeded on all of them.

    Host 0 alone makes and renames it; see `files.replacing_folder`.

    Args:
      config: name and content of the JSON file that describes the model or the adapter. It is written last, for without
        it the folder is none that anything reads.
    """
    out = files.resolved(out)  # through a link, so that what it points to is replaced
    shared = files.shared_temporary(out)
    name, content = config
    with contextlib.ExitStack() as stack:
        new = shared
        if hosts.index == 0:
            temporary = shared if hosts.count > 1 else None
            new = stack.enter_context(files.replacing_folder(out, temporary=temporary, last=name))
        hosts.wait("export: folder made")
        yield new
        hosts.wait("export: files written")
        if hosts.index == 0:
            files.write_json(new / name, content)


def is_export(folder: Path) -> bool:
    """Whether a folder holds a whole export, of a model or of adapters: both are described by a file written last."""
    return any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def is_small(name: str) -> bool:
    """Whether a file of a model's folder is read besides its weights, by its name below that folder."""
    return name in SMALL_FILES or name.startswith(f"{TEMPLATE_FOLDER}/")
