"""Folders of the Hugging Face kind: finding them, and reading and writing their safetensors and small files.

Nothing here unpickles or runs code that came with a model.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import ml_dtypes  # noqa: F401  gives numpy its bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.models.weights import FLOATS, Header
from dpo_jax.types import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
# Everything a download may bring, and everything an export may write besides its weights. No *.bin, no *.py.
SMALL_FILES = (CONFIG, "generation_config.json", INDEX, *TOKENIZER_FILES)


class Weights(NamedTuple):
    """An open checkpoint: what it holds, and a function that reads one tensor by name."""

    headers: dict[str, Header]
    read: Callable[[str], np.ndarray]


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def resolve(path: str | Path) -> Path:
    """A local folder as it is, or the downloaded snapshot of a Hub id such as owner/name.

    Raises: InputError if `path` is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    reason = "no such folder"
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        patterns = ["model*.safetensors", *SMALL_FILES, f"{TEMPLATE_FOLDER}/*.jinja"]
        try:
            return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
        except (OSError, ValueError) as error:  # every Hub and connection error is one of these
            reason = f"no such folder, and the Hub answered: {' '.join(str(error).split())}"
    raise InputError(
        str(path),
        got=reason,
        expected="a folder with a Hugging Face model, or its id on the Hub",
        remedy="Check the spelling; gated models need `hf auth login` first.",
    )


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError if it is not there or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
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
    """The safetensors files of a checkpoint. Raises InputError if there are none or one is not there."""
    if (folder / SINGLE).is_file():  # transformers, too, prefers it to an index
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        raise InputError(
            str(folder),
            got=f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights",
            expected=f"{SINGLE} or {INDEX}",
            remedy="Pickle files can run code and are never read. Where torch is installed, convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder).",
        )
    found = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    # Only plain names: an index must not reach outside its folder.
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent or not names:
        raise InputError(
            str(folder / INDEX),
            got=f"names files that are not in the folder: {', '.join(absent)}" if absent else "names no files",
            expected="every file of the checkpoint",
            remedy="Download or copy the missing files.",
        )
    return [folder / name for name in names]


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Opens a checkpoint's safetensors, one file or many; numbers are read only when asked for.

    Raises: InputError if a file is damaged, or two files hold the same tensor.
    """
    with contextlib.ExitStack() as stack:
        headers: dict[str, Header] = {}
        homes: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    str(path),
                    got=f"damaged or not readable ({error})",
                    expected="a safetensors file",
                    remedy="Download it again.",
                ) from error
            for name in file.keys():
                if name in homes:
                    raise InputError(
                        str(path), got=f"{name} again", expected="each tensor in one file", remedy="Remove one of them."
                    )
                view = file.get_slice(name)
                headers[name], homes[name] = Header(view.get_dtype(), tuple(view.get_shape())), file
        yield Weights(headers, lambda name: homes[name].get_tensor(name))


def write_weights(
    folder: Path, specs: Sequence[Spec], build: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or numbered files and their index where it would exceed `max_shard_bytes`.

    `build(name)` is called once for each tensor, when its turn to be written has come, so that no more than one of
    them is in memory.
    """
    by_name = {spec.name: spec for spec in specs}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        {name: by_name[name].bytes for name in sorted(by_name)},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for filename, names in split.filename_to_tensors.items():
        write_file(folder / filename, [by_name[name] for name in names], build)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_file(path: Path, specs: Sequence[Spec], build: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, byte for byte as the safetensors library does, a tensor at a time.

    The library itself wants every tensor of the file in memory at once. Layout: eight bytes of header length, a JSON
    header padded with spaces to a multiple of eight, then the numbers, widest types first so that all are aligned.
    """
    codes = {dtype: code for code, dtype in FLOATS.items()}
    rank = list(FLOATS)
    ordered = sorted(specs, key=lambda spec: (rank.index(codes[spec.dtype]), spec.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.bytes
        header[spec.name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in ordered:
            array = np.ascontiguousarray(build(spec.name))
            assert (array.dtype, array.shape) == (np.dtype(spec.dtype), spec.shape), spec.name
            file.write(array.view(np.uint8).data)


def write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> int:
    """Copies the tokenizer and chat templates that `source` has; returns how many files."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    names += [f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted((source / TEMPLATE_FOLDER).glob("*.jinja"))]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return len(names)


def check_replaceable(out: Path) -> None:
    """Raises InputError unless `out` is absent, or a folder with nothing in it but what an export writes."""
    if not out.exists():
        return
    ours = {*SMALL_FILES, "README.md", TEMPLATE_FOLDER}
    strangers = (
        [path.name for path in sorted(out.iterdir()) if not (path.name in ours or path.match("model*.safetensors"))]
        if out.is_dir()
        else [out.name]
    )
    if strangers:
        raise InputError(
            str(out),
            got=f"holds {', '.join(strangers[:5])}{' ...' if len(strangers) > 5 else ''}",
            expected="a new folder, or an earlier export to replace",
            remedy="Choose another folder; this one would be deleted.",
        )


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place if the body succeeds, and vanishes if it does not.

    A process killed meanwhile leaves a hidden folder beside `out`, and never half of one in its place.
    """
    out = out.resolve()  # through a link, so that what it points to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    new, old = out.with_name(f".{out.name}.new-{token}"), out.with_name(f".{out.name}.old-{token}")
    new.mkdir()
    try:
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
