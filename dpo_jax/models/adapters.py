"""Low-rank adapters, and folders of them in the format of PEFT.

Beside a kernel W [I, O] that does not train stand A [I, r] and B [r, O] that do:

    y = x W + scale (x A) B,  scale = alpha / r, or alpha / sqrt(r) if rank-stabilised

A starts uniform in +-1/sqrt(I) and B at 0, so at first y is that of the kernel alone, exactly. Maps that the checkpoint
stores as one have an A in common, as they would have in PEFT: it stands beside the first of them.
Sources: Hu et al. 2021 (LoRA, arXiv 2106.09685), Eq. 3; Kalajdzievski 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from dpo_jax.models import hf_config, hf_files, hf_io, quantised, weights
from dpo_jax.models.weights import Sizes, Tensor
from dpo_jax.types import InputError

CONFIG, FILE = hf_files.ADAPTER_CONFIG, hf_files.ADAPTER
PREFIX = "base_model.model."  # PEFT's, of every name
KERNEL = re.compile(r"blocks/(attention|mlp)/\w+/kernel")  # leaves that can have an adapter
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


class Adapters(NamedTuple):
    """Which kernels have adapters, and of what form."""

    rank: int
    alpha: float
    rank_stabilised: bool
    tensors: tuple[Tensor, ...]  # of the checkpoint, that have one

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def table(self) -> list[Tensor]:
        """Every adapter's tensors as PEFT stores them, and the leaves that hold them."""
        both = [each.low_rank(PREFIX + module_of(each), self.rank) for each in self.tensors if each.low_rank]
        return [tensor for pair in both for tensor in pair]

    @property
    def leaves(self) -> list[str]:
        """Paths of all that hold adapters."""
        return [leaf for tensor in self.table for leaf in tensor.leaves]

    @property
    def first_factors(self) -> dict[str, str]:
        """Of each kernel with an adapter, by the path of what holds it: the path of the leaf A."""
        parents = [[leaf.rpartition("/")[0] for leaf in each.leaves] for each in self.tensors]
        return {parent: f"{group[0]}/lora_a" for group in parents for parent in group}


def is_factor(path: str) -> bool:
    """Whether a leaf is an A or a B."""
    return path.endswith(("/lora_a", "/lora_b"))


def module_of(tensor: Tensor) -> str:
    """The name, with `{layer}`, of the module of transformers whose weight a tensor is."""
    return tensor.names[0].removesuffix(".weight")


def choose(table: Sequence[Tensor], sizes: Sizes, targets: str) -> tuple[Tensor, ...]:
    """The tensors that get adapters.

    Args:
      table: of the model's family.
      targets: a regular expression, matched in full against names of modules, such as
        model.layers.0.self_attn.q_proj; empty: all linear maps in blocks but those of experts and routers.
    Raises: InputError if it matches none, or a module in some of the layers only.
    """
    able = [each for each in table if each.low_rank and all(KERNEL.fullmatch(leaf) for leaf in each.leaves)]
    if not targets:
        return tuple(able)
    found, partly = [], []
    for each in able:
        names = [module_of(each).format(layer=layer) for layer in range(sizes["layer"])]
        matched = [name for name in names if re.fullmatch(targets, name)]
        if matched:
            (found if len(matched) == len(names) else partly).append(each)
    if partly or not found:
        raise InputError(
            "config.lora.targets",
            got=f"{targets!r}, which matches "
            + (f"{', '.join(map(module_of, partly))} in some of the layers only" if partly else "none of them"),
            expected=f"a regular expression of some of {', '.join(map(module_of, able))}, in every layer",
            remedy="Correct it; it has to match the whole of a name.",
        )
    return tuple(found)


def spread(params: Mapping, adapters: Adapters) -> dict:
    """Parameters in which every kernel with an adapter has its own A: those with one in common have the same array."""
    leaves = hf_io.flatten(params)
    return hf_io.nest(leaves | {f"{parent}/lora_a": leaves[a] for parent, a in adapters.first_factors.items()})


def merge(params: Mapping, adapters: Adapters) -> dict:
    """Parameters without adapters: kernels W + scale A B, in float32 or wider."""
    leaves = hf_io.flatten(quantised.decoded(params))
    for parent, a in adapters.first_factors.items():
        leaves[f"{parent}/kernel"] = _merged(
            leaves[f"{parent}/kernel"], leaves[a], leaves[f"{parent}/lora_b"], adapters.scale
        )
    return hf_io.nest({path: leaf for path, leaf in leaves.items() if not is_factor(path)})


@jax.jit
def _merged(kernel: Any, a: Any, b: Any, scale: Any) -> Any:
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    product = jax.lax.dot_general(
        a.astype(wide), b.astype(wide), (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )
    return kernel.astype(wide) + scale * product


def first_values(adapters: Adapters, sizes: Sizes, *, seed: int, place: Any = hf_io.whole) -> dict[str, Any]:
    """Leaves by path before the first update, float32: what each is depends on seed and path alone.

    Args:
      place: as for `hf_io.load_params`.
    """

    def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("lora_b"):
            return np.zeros(shape, np.float32)
        bound = 1 / math.sqrt(math.prod(shape[1:-1]))
        rng = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(path.encode())])
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    shapes = weights.leaf_shapes(adapters.table, sizes)
    return {path: place(path, shape, drawn(path, shape).__getitem__) for path, shape in shapes.items()}


# --- folders as PEFT writes them --------------------------------------------------------------------------------------


def read(folder: Path, table: Sequence[Tensor], sizes: Sizes) -> Adapters:
    """What a folder holds; numbers are not read, names and shapes are.

    Args:
      table: of the model's family.
    Raises: InputError if it holds no LoRA adapter of such a model, or one with what is not implemented.
    """
    path = folder / CONFIG
    fields = hf_files.read_json(path)
    place = str(path)
    kind = hf_config.take(fields, "peft_type", str, place=place)
    if kind != "LORA":
        raise InputError(f"{place}: peft_type", got=kind, expected="LORA", remedy="Merge it into its model with PEFT.")
    rank = hf_config.take(fields, "r", int, place=place)
    alpha = hf_config.take(fields, "lora_alpha", float, place=place, default=8.0)
    stabilised = hf_config.take(fields, "use_rslora", bool, place=place, default=False)
    hf_config.finish({name: fields[name] for name in fields if name not in UNREAD}, place=place, neutral=NEUTRAL)
    if not (folder / FILE).is_file():
        raise InputError(
            str(folder), got=f"no {FILE}", expected="an adapter in safetensors", remedy="Save it with PEFT again."
        )
    with hf_files.open_weights(folder / FILE) as source:
        stems = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in source.headers}
        able = choose(table, sizes, "")
        held = [each for each in able if module_of(each).format(layer=0) in stems]
        found = Adapters(rank, alpha, stabilised, tuple(held))
        weights.bind(found.table, sizes, source.headers, skipped="", place=str(folder / FILE))
    return found


def load(folder: Path, adapters: Adapters, sizes: Sizes, *, place: Any = hf_io.whole) -> dict[str, Any]:
    """Leaves by path of the adapters in a folder, float32. Raises: InputError as `hf_io.load_params`.

    Args:
      place: as for `hf_io.load_params`.
    """
    return hf_io.load_leaves(folder / FILE, adapters.table, sizes, skipped="", dtype="float32", place=place)


def digest(folder: Path, adapters: Adapters) -> str:
    """A 128-bit hash, in hexadecimal, of all that decides what an adapter computes."""
    with hf_files.open_weights(folder / FILE) as source:
        lines = [repr(adapters.scale), *(hf_io.tensor_digest(source, name) for name in sorted(source.headers))]
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
    hosts: hf_files.Hosts = hf_files.ONE_HOST,
) -> None:
    """Writes the adapters among `params` as a folder that PEFT loads.

    Args:
      table: of the model's family.
      base: the model they belong to, a Hub id or a folder.
      The others: as for `hf_io.export`.
    """
    shapes = weights.leaf_shapes(adapters.table, sizes)
    leaves = {path: leaf for path, leaf in hf_io.flatten(params).items() if path in shapes}
    hf_io.fitting(hf_io.nest(leaves), shapes)
    hf_io.check_dtype(dtype, str(out))
    hf_files.check_replaceable(out)
    hf_io.check_tokenizer(tokenizer)
    bound = weights.all_names(adapters.table, sizes)
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
    with hf_files.replacing(out, hosts) as new:
        if hosts.index == 0:
            hf_files.write_json(new / CONFIG, described)
            hf_io.write_companions(new, tokenizer=tokenizer, card=card)
        dtypes = {b.name: dtype for b in bound}
        hf_io.write_tensors(new, leaves, bound, dtypes, 2**62, hosts, stem=Path(FILE).stem)


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
