"""TODO hf.peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpo_jax import trees
from dpo_jax.hf import checkpoints, config_json, folders
from dpo_jax.hf.adapters import PREFIX, Adapters, choose, module_of
from dpo_jax.hf.tensors import Sizes, Tensor, all_names, bind, leaf_shapes
from dpo_jax.runtime import files
from dpo_jax.types import InputError

CONFIG, FILE = folders.ADAPTER_CONFIG, folders.ADAPTER


# Fields of adapter_config.json that say how an adapter came about or is stored, not what it computes.
UNREAD = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type"
).split()


NEUTRAL: dict[str, tuple] = {
    "alora_invocation_tokens": ([],),
    "alpha_pattern": ({},),
    "arrow_config": ({},),
    "bias": ("none",),
    # Others, such as pissa, take what they start from away from the model's weights.
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
    """What a folder holds; numbers are not read, names and shapes are.

    Args:
      table: of the model's family.
    Raises: InputError if it holds no LoRA adapter of such a model, or one with what is not implemented.
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
        held = [each for each in able if module_of(each).format(layer=0) in stems]
        found = Adapters(rank, alpha, stabilized, tuple(held))
        bind(found.table, sizes, source.headers, skipped="", place=str(folder / FILE))
    return found


def load(folder: Path, adapters: Adapters, sizes: Sizes, *, place: Any = checkpoints.whole) -> dict[str, Any]:
    """Leaves by path of the adapters in a folder, float32. Raises: InputError as `hf_io.load_params`.

    Args:
      place: as for `hf_io.load_params`.
    """
    return checkpoints.load_leaves(folder / FILE, adapters.table, sizes, skipped="", dtype="float32", place=place)


def digest(folder: Path, adapters: Adapters) -> str:
    """A 128-bit hash, in hexadecimal, of all that decides what an adapter computes."""
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
    dtype: str = "float32",
    tokenizer: Path | None = None,
    card: str = "",
    hosts: folders.Hosts = folders.ONE_HOST,
) -> None:
    """Writes the adapters among `params` as a folder that PEFT loads.

    Args:
      table: of the model's family.
      base: the model they belong to, a Hub id or a folder.
      The others: as for `hf_io.export`.
    """
    shapes = leaf_shapes(adapters.table, sizes)
    leaves = {path: leaf for path, leaf in trees.flatten(params).items() if path in shapes}
    checkpoints.fitting(trees.nest(leaves), shapes)
    checkpoints.check_dtype(dtype, str(out))
    folders.check_replaceable(out)
    checkpoints.check_tokenizer(tokenizer)
    bound = all_names(adapters.table, sizes)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapters.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": all(map(stored_turned, adapters.tensors)),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": endings(adapters.tensors, choose(table, sizes, "")),
    }
    with folders.replacing(out, hosts) as new:
        if hosts.index == 0:
            files.write_json(new / CONFIG, described)
            checkpoints.write_companions(new, tokenizer=tokenizer, card=card)
        dtypes = {b.name: dtype for b in bound}
        checkpoints.write_tensors(new, leaves, bound, dtypes, 2**62, hosts, stem=Path(FILE).stem)


def stored_turned(tensor: Tensor) -> bool:
    """Whether a linear map is stored [in, out], as GPT-2's are, and not [out, in]."""
    return tensor.to_leaves(np.empty(tensor.shape, np.int8))[0].strides[-1] == 1


def endings(chosen: Sequence[Tensor], able: Sequence[Tensor]) -> list[str]:
    """What the names of the modules end in, and those of no other module that could have an adapter."""

    def of(tensor: Tensor, parts: int) -> str:
        return ".".join(module_of(tensor).split(".")[-parts:])

    names = {module_of(each) for each in chosen}
    others = [each for each in able if module_of(each) not in names]
    found = set()
    for each in chosen:
        parts = 1
        while any(of(other, parts) == of(each, parts) for other in others):
            parts += 1
        found.add(of(each, parts))
    return sorted(found)
