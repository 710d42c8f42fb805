"""Reads and writes folders of low-rank adapters in the format of PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xxhash

from dpo_jax import trees
from dpo_jax.hf import checkpoints, config_json, folders
from dpo_jax.hf.adapters import PREFIX, Adapters, choose, in_layer_n, module_of
from dpo_jax.hf.checkpoints import DEFAULT, Place, WriteOptions
from dpo_jax.hf.tensors import Sizes, Tensor, all_names, bind, leaf_shapes
from dpo_jax.runtime.files import Path
from dpo_jax.types import InputError, listed

CONFIG, FILE = folders.ADAPTER_CONFIG, folders.ADAPTER

# Fields of adapter_config.json that say how an adapter was made or is stored, not what it computes.
UNREAD = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type"
).split()

# Values at which an option that is not off changes nothing here.
NEUTRAL: dict[str, tuple] = {
    "bias": ("none",),
    # Others, such as pissa, subtract the initial adapter from the model's weights.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


# Kinds that add vectors to the sequence and change no weight.
UNMERGEABLE = "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT CARTRIDGE".split()
MERGE = (
    "Merge it with PEFT: PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new_folder); then "
    "give --config.model.path=NEW_FOLDER, and no lora.path."
)


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
        remedy = "Its vectors cannot be merged into weights: train LoRA instead." if kind in UNMERGEABLE else MERGE
        raise InputError(f"{place}: peft_type", got=f"got {kind}", expected="LORA", remedy=remedy)
    rank = config_json.take(fields, "r", int, place=place)
    alpha = config_json.take(fields, "lora_alpha", float, place=place, default=8.0)
    stabilized = config_json.take(fields, "use_rslora", bool, place=place, default=False)
    check_options(fields, place)
    if not (folder / FILE).is_file():
        pickled = (folder / FILE).with_suffix(".bin")
        raise InputError(
            str(folder),
            got=f"no {FILE}{f', but {pickled.name}' if pickled.is_file() else ''}",
            expected="an adapter in safetensors; pickle files can run code and are never read",
            remedy="Save it again with PEFT: PeftModel.from_pretrained(model, folder).save_pretrained(new_folder).",
        )
    with folders.open_weights(folder / FILE) as source:
        able = choose(table, sizes, "")
        adapted = adapted_by(source.headers, able, sizes, place=str(folder / FILE))
        adapters = Adapters(rank, alpha, stabilized, tuple(adapted))
        bind(adapters.table, sizes, source.headers, skipped="", place=str(folder / FILE), adapter_remedy=MERGE)
    return adapters


def check_options(fields: Mapping, place: str) -> None:
    """Raises InputError naming every option of an adapter_config.json that changes what a plain LoRA adapter computes.

    Options that are off (null, false, empty) pass, known or not.
    """
    wrong = {
        name: value
        for name, value in fields.items()
        if name not in UNREAD and value and value not in NEUTRAL.get(name, ())
    }
    if wrong:
        raise InputError(
            place,
            got=f"got {', '.join(f'{name}={value!r:.100}' for name, value in sorted(wrong.items()))}",
            expected="a plain LoRA adapter without these options",
            remedy=MERGE,
        )


def adapted_by(names: Iterable[str], able: Sequence[Tensor], sizes: Sizes, *, place: str) -> list[Tensor]:
    """Returns the tensors of a model that an adapter's tensors, by their names, belong to.

    Raises: InputError if it has tensors of others, such as embeddings, of some layers only, or of another model.
    """
    stems = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}
    layers = range(sizes["layer"])
    # {module, with {layer}: its names in the layers that have an adapter}
    adapted = {
        module: [name for layer in layers if (name := module.format(layer=layer)) in stems]
        for module in map(module_of, able)
    }
    others = sorted(stems - {name for found in adapted.values() for name in found})
    partly = [
        f"{module.replace('{layer}', 'N')} in {len(found)} of {len(layers)} layers"
        for module, found in adapted.items()
        if 0 < len(found) < len(layers)
    ]
    if others or partly:
        raise InputError(
            place,
            got=f"changes {listed(others or partly)}",
            expected=f"adapters of {in_layer_n(able)}, each in all layers N",
            remedy="If it is of another model, give that as --config.model.path. If not: " + MERGE,
        )
    return [each for each in able if adapted[module_of(each)]]


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
    with folders.replacing(out, options.hosts, (CONFIG, fields)) as new:
        if options.hosts.index == 0:
            checkpoints.write_companions(new, tokenizer=options.tokenizer, card=options.card)
        dtypes = {b.name: dtype for b in bound}
        one_file = options._replace(max_shard_bytes=2**62)  # PEFT reads no numbered files
        checkpoints.write_tensors(new, leaves, bound, dtypes, one_file, stem=FILE.removesuffix(".safetensors"))


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
