"""TODO parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax import accumulate, sharding
from dpo_jax.hf import adapters as low_rank
from dpo_jax.logprobs.completions import completion_logps, sum_by_slot
from dpo_jax.logprobs.vocabulary import ACCELERATOR_BLOCKS, CPU_BLOCKS, Head, Spread
from dpo_jax.models import decoder, experts
from dpo_jax.models.attention import choose
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.layers import Across, across_mesh, lookup
from dpo_jax.trees import join
from dpo_jax.types import InputError

# Leaves with something for every word of the vocabulary, by their parents: their gradients are added in place.
WORDS = {"embed": "embedding", "head": "embedding", "logits": "bias"}


def make_logps_fn(
    config: DecoderConfig,
    *,
    pairs: int,
    answers: int = 2,
    dtype: Any,
    remat: str = "none",
    attention: str = "xla",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    adapters: low_rank.Adapters | None = None,
    sums: Collection[str] = (),
    tokens: int | None = None,
) -> Callable[..., Any]:
    """Returns `logps_fn(params, rows) -> (logps [P, K], {"logits": [P, K], ...})` for a decoder, the second sums over
    answer tokens: of the mean logit, of what `experts.routing` says, and those asked for.

    With a third argument, `sums` as in `gradients`, it returns `((logps, ...), sums)`. With `frozen`, parameters that
    are not among `params`, it reads those as well; their gradients are not made.

    Args:
      pairs, answers, dtype, remat: see `completion_logps` and `decoder.hidden_states`.
      attention: an implementation that `attention.choose` gave.
      mesh: what rows and parameters lie across, as `sharding` has it; None: one device of JAX's default platform.
      rules: by which parameters do.
      adapters: that are among the parameters.
      sums: further ones to make, see `completion_logps`.
      tokens: C: `{"tokens": (log-probs of the targets [R, T], the C likeliest tokens in place of each [R, T, C], their
        log-probs)}` is returned besides, and nothing can be differentiated; None: it is not.
    Raises: InputError if there are no C tokens.
    """
    if tokens is not None and tokens > config.vocab_size:
        raise InputError(
            "config.loss.kl_tokens",
            got=f"got {tokens}, and the vocabulary has {config.vocab_size} tokens",
            expected=f"at most {config.vocab_size}",
            remedy="Lower it.",
        )
    asked = functools.partial(completion_logps, sums=tuple(sums), likely=tokens)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    of_attention = of_head = move = across = stay = None
    if mesh is not None and mesh.size > 1:
        heads = sharding.divides("tensor", mesh, config.heads, config.kv_heads)
        of_attention = choose.Spread(mesh, sharding.ROW_AXES, heads)
        tables = {
            name: sharding.partition(f"{name}/embedding", (config.vocab_size, config.width), mesh.shape, rules)
            for name in ("embed", "head")
        }
        scatter = functools.partial(sharding.sum_scattered, mesh)
        of_head = Spread(
            mesh, sharding.ROW_AXES, *tables["embed" if config.tie_embeddings else "head"], scatter=scatter
        )
        columns = tables["embed"][1]
        if columns in sharding.ROW_AXES:
            others = tuple(axis for axis in sharding.ROW_AXES if axis != columns)
            place = NamedSharding(mesh, PartitionSpec(others, None, columns))
            move = functools.partial(jax.lax.with_sharding_constraint, shardings=place)
        by_rows = NamedSharding(mesh, PartitionSpec(sharding.ROW_AXES))
        stay = functools.partial(jax.lax.with_sharding_constraint, shardings=by_rows)
        across = functools.partial(kernel_across, config, mesh, rules)
    attend = choose.make_attention(attention, platform=platform, spread=of_attention)
    of_experts = decoder.Mixing(
        block=experts.BLOCKS.get(platform), mesh=experts_across(config, mesh, rules) if mesh is not None else None
    )
    blocks = CPU_BLOCKS if platform == "cpu" else ACCELERATOR_BLOCKS

    def logps_fn(params: Any, rows: Any, sums: Any = None, *, frozen: Any = None) -> Any:
        words, body = of_words(params)
        trained = tuple(words)
        totals: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        if sums is not None:
            totals, rest = of_words(sums)
            body, rest = accumulate.collect(body, rest)
        if frozen is not None:
            others, still = of_words(frozen)
            words, body = words | others, join(body, still)
        if adapters is not None:
            body = low_rank.with_shared_factors(body, adapters)
        x, totals["embed"] = lookup(words["embed"], rows.tokens, totals.get("embed"), move)
        # Or XLA has the gradient, which is moved to the table's columns at the end, lie so in every block.
        x = x if stay is None else stay(x)
        hidden, found = decoder.hidden_states(
            body,
            config,
            x,
            rows.positions,
            rows.key_start,
            rows.key_end,
            dtype=dtype,
            remat=remat,
            attend=attend,
            across=across,
            mixing=of_experts,
            adapter_scale=1.0 if adapters is None else adapters.scale,
            unfed=1,
        )
        last = "head" if "head" in words else "embed"
        logps, aux, total = asked(
            hidden,
            words[last],
            rows,
            pairs=pairs,
            answers=answers,
            bias=words.get("logits"),
            soft_cap=config.logit_soft_cap,
            blocks=blocks,
            spread=of_head,
            total=None if sums is None else Head(totals.get(last), totals.get("logits")),
        )
        at_source = {name: jnp.take_along_axis(values, rows.source, 1) for name, values in found.items()}
        aux |= {name: sum_by_slot(values, rows.slot, pairs, answers) for name, values in at_source.items()}
        if total is None:
            return logps, aux
        totals |= {last: total.weights, "logits": total.bias}
        return (logps, aux), rest | {name: {WORDS[name]: totals[name]} for name in trained}

    return logps_fn


def of_words(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of parameters, or of sums of their gradients: the leaves in WORDS, each by its parent's name, and the rest."""
    words = {name: tree[name][leaf] for name, leaf in WORDS.items() if name in tree}
    return words, {name: tree[name] for name in tree if name not in WORDS}


def kernel_across(
    config: DecoderConfig,
    mesh: Mesh,
    rules: sharding.Rules,
    path: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Across | None:
    """How a kernel lies on the mesh; None: in a way that XLA has to find the best use of."""
    shape = config.layers, *inputs, *outputs
    spec = (*sharding.partition(path, shape, mesh.shape, rules), *(None for _ in shape))
    sides = spec[1 : 1 + len(inputs)], spec[1 + len(inputs) : len(shape)]
    # The axes of a side are one axis of the product, which is cut where the first of them is.
    if spec[0] is not None or any(axis is not None for side in sides for axis in side[1:]):
        return None
    scatter = functools.partial(sharding.sum_scattered, mesh)
    return across_mesh(mesh, sharding.ROW_AXES, *(side[0] for side in sides), scatter=scatter)


def experts_across(config: DecoderConfig, mesh: Mesh, rules: sharding.Rules) -> experts.Spread | None:
    """How experts lie on the mesh; sides that lie otherwise than they can be used are moved by XLA."""
    if mesh.size == 1 or not config.experts:
        return None
    shape = config.layers, config.experts, config.width, config.mlp_width
    _, _, width, hidden = (*sharding.partition("blocks/experts/up/kernel", shape, mesh.shape, rules), *(None,) * 4)[:4]
    return experts.Spread(
        mesh,
        sharding.ROW_AXES,
        width if width in sharding.ROW_AXES else None,
        None if hidden in sharding.ROW_AXES else hidden,
        functools.partial(sharding.sum_scattered, mesh),
    )
