"""Reads and writes folders of low-rank adapters in the format of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from dpo_jax import trees
from dpo_jax.hf import checkpoints, config_json, folders
from dpo_jax.hf.adapters import PREFIX, Adapters, choose, module_of
from dpo_jax.hf.checkpoints import DEFAULT, Place, WriteOptions
from dpo_jax.hf.tensors import Sizes, Tensor, all_names, bind, leaf_shapes
from dpo_jax.runtime import files
from dpo_jax.types import InputError

CONFIG, FILE = folders.ADAPTER_CONFIG, folders.ADAPTER

# Fields of adapter_config.json that say how an adapter was made or is stored, not what it computes.
UNREAD = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type"
).split()

# Fields that change what an adapter computes unless they have one of these values.
NEUTRAL: dict[str, tuple] = {
    "alora_invocation_tokens": ([],),
    "alpha_pattern": ({},),
    "arrow_config": ({},),
    "bias": ("none",),
    # Others, such as pissa, subtract the initial adapter from the model's weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "kasa_config": ({},),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "monteclora_config": ({},),
    "rank_pattern": ({},),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    "use_bdlora": (False, {}),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": ({},),
}


def read(folder: Path, table: Sequence[Tensor], sizes: Sizes) -> Adapters:
    """Returns the adapters that a folder describes; names and shapes are read, numbers are not.

    Args:
      table, sizes: the tensors of the model's family, and the numbers of its layers and experts.
    Raises: InputError if it holds no LoRA adapter of such a model, or one with an option that is not implemented.
    """
    path = folder / CONFIG
    fields = folders.read_json(path)
    place = str(path)
    kind = config_json.take(fields, "peft_type", str, place=place)
    if kind != "LORA":
        raise InputError(f"{place}: peft_type", got=kind, expected="LORA", remedy="Merge it into its model with PEFT.")
    rank = config_json.take(fields, "r", int, place=place)
    alpha = config_json.take(fields, "lora_alpha", float, place=place, default=8.0)
    stabilized = config_json.take(fields, "use_rslora", bool, place=place, default=False)
    config_json.finish({name: fields[name] for name in fields if name not in UNREAD}, place=place, neutral=NEUTRAL)
    if not (folder / FILE).is_file():
        raise InputError(
            str(folder), got=f"no {FILE}", expected="an adapter in safetensors", remedy="Save it with PEFT again."
        )
    with folders.open_weights(folder / FILE) as source:
        stems = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in source.headers}
        able = choose(table, sizes, "")
        adapted = [each for each in able if module_of(each).format(layer=0) in stems]
        adapters = Adapters(rank, alpha, stabilized, tuple(adapted))
        bind(adapters.table, sizes, source.headers, skipped="", place=str(folder / FILE))
    return adapters


def load(folder: Path, adapters: Adapters, sizes: Sizes, *, place: Place = checkpoints.whole) -> dict:
    """Reads the leaves of the adapters in a folder, by path, in float32.

    Args, raises: as for `checkpoints.load_params`.
    """
    return checkpoints.load_leaves(folder / FILE, adapters.table, sizes, skipped="", dtype="float32", place=place)


def digest(folder: Path, adapters: Adapters) -> str:
    """Returns a 128-bit hash, in hexadecimal, of the scale and the tensors of an adapter."""
    with folders.open_weights(folder / FILE) as source:
        lines = [repr(adapters.scale), *(checkpoints.tensor_digest(source, name) for name in sorted(source.headers))]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def save(
    params: Mapping,
    adapters: Adapters,
    table: Sequence[Tensor],
    sizes: Sizes,
    *,
    base: str,
    out: Path,
    options: WriteOptions = DEFAULT,
) -> None:
    """Writes the adapters among `params` as a folder that PEFT loads; the weights are one file.

    Args:
      table, sizes: the tensors of the model's family, and the numbers of its layers and experts.
      base: the model they belong to, a Hub id or a folder.
      params, out, options: as for `checkpoints.export`.
    Raises: InputError as `checkpoints.export`.
    """
    dtype = options.dtype or "float32"
    shapes = leaf_shapes(adapters.table, sizes)
    leaves = {path: leaf for path, leaf in trees.flatten(params).items() if path in shapes}
    checkpoints.fitting(trees.nest(leaves), shapes)
    checkpoints.check_dtype(dtype, str(out))
    folders.check_replaceable(out)
    checkpoints.check_tokenizer(options.tokenizer)
    bound = all_names(adapters.table, sizes)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapters.rank_stabilized,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": all(map(stored_in_out, adapters.tensors)),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": endings(adapters.tensors, choose(table, sizes, "")),
    }
    with folders.replacing(out, options.hosts) as new:
        if options.hosts.index == 0:
            files.write_json(new / CONFIG, fields)
            checkpoints.write_companions(new, tokenizer=options.tokenizer, card=options.card)
        dtypes = {b.name: dtype for b in bound}
        one_file = options._replace(max_shard_bytes=2**62)  # PEFT reads no numbered files
        checkpoints.write_tensors(new, leaves, bound, dtypes, one_file, stem=Path(FILE).stem)


def stored_in_out(tensor: Tensor) -> bool:
    """Returns whether a linear map is stored [in, out], as GPT-2's are, and not [out, in]."""
    return tensor.to_leaves(np.empty(tensor.shape, np.int8))[0].strides[-1] == 1


def endings(chosen: Sequence[Tensor], able: Sequence[Tensor]) -> list[str]:
    """Returns the shortest endings of module names that match every chosen module and no other.

    Args:
      able: all tensors that could have an adapter.
    """

    def ending(tensor: Tensor, parts: int) -> str:
        return ".".join(module_of(tensor).split(".")[-parts:])

    names = {module_of(each) for each in chosen}
    unchosen = [each for each in able if module_of(each) not in names]
    endings = set()
    for each in chosen:
        parts = 1
        while any(ending(other, parts) == ending(each, parts) for other in unchosen):
            parts += 1
        endings.add(ending(each, parts))
    return sorted(endings)
