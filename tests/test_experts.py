"""The mixture of experts against its formula, transformers' blocks, and itself on meshes; and how much work it does."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import sharding
from dpo_jax.models.experts import (
    ExpertSharding,
    MixtureOptions,
    _block_size,
    _sort,
    balance_loss,
    mixture,
    route,
    router_load,
)

WAYS = {"ragged": None, "blocks": 16}
FORMULA = 0
N, D, F, E, K = 40, 16, 24, 6, 2
MESHES = {"fsdp 8": (1, 8, 1), "tensor 8": (1, 1, 8), "fsdp 4, tensor 2": (1, 4, 2), "2x2x2": (2, 2, 2)}

silu = jax.nn.silu
# Fast-compile flags: most of the time of these tests is compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
both_ways = pytest.mark.parametrize("block", WAYS.values(), ids=WAYS)


class Drawn(NamedTuple):
    """Array arguments of `mixture`, in its order."""

    x: Any
    weights: Any
    experts: Any
    gate: Any
    up: Any
    down: Any


def draw(tokens=N, width=D, hidden=F, count=E, top_k=K, dtype: Any = jnp.float32, seed=0) -> Drawn:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    chosen = np.argsort(rng.random((tokens, count)), axis=1)[:, :top_k]
    kernels = [normal(count, width, hidden), normal(count, width, hidden), normal(count, hidden, width)]
    weights = jnp.asarray(rng.random((tokens, top_k)), dtype)
    return Drawn(normal(tokens, width), weights, jnp.asarray(chosen, jnp.int32), *(each / 4 for each in kernels))


def formula(x, weights, chosen, gate, up, down, *, real):
    """Applies every expert to every token; all but the chosen ones get weight 0."""
    hidden = silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    out = jnp.einsum("nef,efd->ned", hidden, down)
    share = jnp.sum(jax.nn.one_hot(chosen, len(gate), dtype=x.dtype) * weights[:, :, None], axis=1)
    return jnp.where(real[:, None], jnp.einsum("ne,ned->nd", share, out), 0)


@functools.cache
def compiled(block, shards):
    """Compiles `formula`, if `block` is 0, or `mixture`, and the gradients of a weighted sum of its values."""
    function = formula if block == 0 else functools.partial(mixture, options=MixtureOptions(silu, block, shards))

    def loss(x, weights, gate, up, down, chosen, real):
        y = function(x, weights, chosen, gate, up, down, real=real)
        return jnp.sum(y * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)), y

    return jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))


def results(block, drawn: Drawn, real=None, shards=None) -> list[np.ndarray]:
    """Returns values, and the gradients by x, weights and matrices."""
    x, weights, chosen, *kernels = drawn
    real = jnp.ones(len(x), bool) if real is None else real
    grads, y = compiled(block, shards)(x, weights, *kernels, chosen, real)
    return [np.asarray(each) for each in (y, *grads)]


def assert_near(ours, theirs, bound):
    """Asserts that errors are within a bound, relative to the largest number of each array."""
    for name, one, other in zip(("y", "x", "weights", "gate", "up", "down"), ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.abs(one - other).max() <= bound * np.abs(other).max(), name


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def skewed(drawn: Drawn, how: str) -> Drawn:
    """Redirects the choices: as drawn, all to one expert, to all experts but one; or drops all tokens but one."""
    chosen = drawn.experts
    if how == "one expert":
        chosen = jnp.full_like(chosen, 3)
    if how == "an idle expert":
        chosen = jnp.where(chosen == 3, 0, chosen)
    if how == "one token":
        return drawn._replace(x=drawn.x[:1], weights=drawn.weights[:1], experts=chosen[:1])
    return drawn._replace(experts=chosen)


@both_ways
@pytest.mark.slow
@pytest.mark.parametrize("how", ["as drawn", "one expert", "an idle expert", "one token"])
def test_mixture_and_its_gradients_are_those_of_the_formula(x64, block, how):
    drawn = skewed(draw(dtype=jnp.float64), how)
    assert_near(results(block, drawn), results(FORMULA, drawn), 1e-13)


@both_ways
def test_positions_that_are_not_real_give_and_take_nothing(x64, block):
    drawn = draw(dtype=jnp.float64)
    real = jnp.arange(N) % 5 < 2
    clean = results(FORMULA, drawn, real)
    spoiled = drawn._replace(x=jnp.where(real[:, None], drawn.x, jnp.nan))  # not even read
    ours = results(block, spoiled, real)
    assert_near(ours, clean, 1e-13)
    assert not np.any(ours[0][~np.asarray(real)])


@both_ways
def test_no_token_at_all_is_real(block):
    assert not any(np.any(each) for each in results(block, draw(), jnp.zeros(N, bool)))


@both_ways
def test_token_gets_the_same_result_whatever_stands_beside_it(block):
    drawn = draw(tokens=200)
    run = jit(functools.partial(mixture, options=MixtureOptions(silu, block)))
    together = run(*drawn)
    for token in (0, 77, 199):
        alone = run(*(each[token : token + 1] for each in drawn[:3]), *drawn[3:])
        np.testing.assert_allclose(together[token], alone[0], rtol=2e-6, atol=2e-6 * float(np.abs(alone).max()))


@both_ways
def test_bfloat16_is_as_exact_as_its_numbers_and_sums_gradients_in_float32(block):
    # The gradient of 1,024 equal tokens: a sum in bfloat16 would stop at 256 times that of the first.
    tokens = 1024
    one = skewed(draw(), "one token")
    exact = [results(FORMULA, one)[0], *results(FORMULA, one)[3:]]
    x, weights, chosen = (jnp.repeat(each, tokens, axis=0) for each in one[:3])
    slope = jnp.cos(jnp.arange(D, dtype=jnp.float32))[None]

    def loss(*kernels):
        y = mixture(x.astype(jnp.bfloat16), weights, chosen, *kernels, options=MixtureOptions(silu, block))
        return jnp.sum(y.astype(jnp.float32) * slope), y

    grads, y = jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*one[3:])
    assert y.dtype == jnp.bfloat16 and all(each.dtype == jnp.float32 for each in grads)  # as the matrices themselves
    assert all(np.any(each != each.astype(jnp.bfloat16).astype(jnp.float32)) for each in grads)  # not rounded to it
    found = y[:1].astype(jnp.float32), *(each / tokens for each in grads)
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("how", ["as drawn", "one expert", "an idle expert", "one token"])
def test_blocks_are_as_many_as_assignments_need(how):
    block = 4
    chosen = skewed(draw(tokens=97), how).experts
    lines = jit(_sort, static_argnums=(1, 2))(chosen, E, block)
    sizes = np.bincount(np.asarray(chosen).ravel(), minlength=E)
    assert int(lines.blocks) == sum(-(-size // block) for size in sizes) <= len(lines.expert)
    chosen, assigned, expert, place = map(np.asarray, (chosen, lines.assignment, lines.expert, lines.place))
    assert sorted(assigned[assigned < chosen.size]) == list(range(chosen.size))  # each once
    for line in np.flatnonzero(assigned < chosen.size):
        assert chosen.ravel()[assigned[line]] == expert[line // block]
        assert place.ravel()[assigned[line]] == line


def test_loops_run_over_the_blocks_in_use_only():
    seen = []

    def activation(x):
        jax.debug.callback(lambda: seen.append(x.shape))
        return silu(x)

    x, weights, chosen, *kernels = skewed(draw(), "an idle expert")
    real = jnp.arange(N) < 10
    loss = lambda *kernels: jnp.sum(
        mixture(x, weights, chosen, *kernels, options=MixtureOptions(activation, 16), real=real)
    )
    jax.block_until_ready(jit(jax.grad(loss, (0, 1, 2)))(*kernels))
    jax.effects_barrier()
    used = len(np.unique(chosen[:10]))  # the few assignments of each fit one block
    assert seen == [(16, F)] * (2 * used) and used < E  # forward and backward


@pytest.mark.parametrize("count, lines", [(8, 64), (64, 16)])
def test_block_costs_the_products_of_one_expert(count, lines):
    # XLA counts the body of a loop once: here three products forward and six backward.
    drawn = draw(tokens=256, width=64, hidden=64, count=count)
    loss = lambda *kernels: jnp.sum(mixture(*drawn[:3], *kernels, options=MixtureOptions(silu, 64)) ** 2)
    analysis: Any = jit(jax.grad(loss, (0, 1, 2))).lower(*drawn[3:]).compile().cost_analysis()
    needed = 9 * 2 * lines * 64 * 64
    assert needed / 2 < analysis["flops"] < 1.2 * needed


def test_blocks_are_of_no_more_lines_than_experts_get():
    options = MixtureOptions(silu, 128)
    assert [_block_size(options, 8 * lines, 8) for lines in (1, 16, 17, 100, 128, 4000)] == [
        *(16, 16, 32, 128, 128, 128)
    ]
    assert _block_size(MixtureOptions(silu, None), 100, 8) is None


def shard_over(sizes, width=D, hidden=F):
    mesh = sharding.make_mesh(*sizes)
    axes = sharding.divides("fsdp", mesh, width), sharding.divides("tensor", mesh, hidden)
    return ExpertSharding(mesh, sharding.ROW_AXES, *axes, scatter=functools.partial(sharding.sum_scattered, mesh))


def placed(drawn: Drawn, shards) -> Drawn:
    mesh, rows, width, hidden, _ = shards
    wide, tall = PartitionSpec(None, width, hidden), PartitionSpec(None, hidden, width)
    specs = [PartitionSpec(rows)] * 3 + [wide, wide, tall]
    return Drawn(*(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(drawn, specs, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("block, name", [(16, name) for name in MESHES] + [(None, "fsdp 4, tensor 2")])
def test_mesh_gives_what_one_device_does(block, name):
    drawn, real = draw(), jnp.arange(N) % 7 != 3
    shards = shard_over(MESHES[name])
    assert_near(results(block, placed(drawn, shards), real, shards), results(block, drawn, real), 1e-5)


@pytest.mark.slow
def test_sides_that_the_mesh_does_not_divide_are_replicated():
    drawn = draw(width=15, hidden=9)
    shards = shard_over((1, 4, 2), 15, 9)
    assert shards.width is None and shards.hidden is None
    assert_near(results(16, placed(drawn, shards), None, shards), results(16, drawn), 1e-5)


def test_shardings_that_would_give_wrong_sums_are_refused():
    shards = shard_over((1, 4, 2))
    for wrong in (shards._replace(width="tensor"), shards._replace(hidden="fsdp")):
        with pytest.raises(ValueError, match="experts.ExpertSharding: width"):
            mixture(*draw(), options=MixtureOptions(silu, sharding=wrong))


@pytest.mark.slow
def test_matrices_are_gathered_in_the_compute_type_and_tokens_stay_where_they_are():
    drawn = draw(tokens=256, dtype=jnp.bfloat16)
    drawn = drawn._replace(**{k: getattr(drawn, k).astype(jnp.float32) for k in ("gate", "up", "down")})
    shards = shard_over((1, 4, 2))
    drawn = placed(drawn, shards)
    router = jnp.ones((D, E), jnp.bfloat16)

    def loss(x, router, *kernels):
        weights, chosen, _ = route(x, router, top_k=K, normalize=True, sharding=shards)
        return jnp.sum(mixture(x, weights, chosen, *kernels, options=MixtureOptions(silu, 16, shards)) ** 2)

    lowered = jit(jax.grad(loss, (0, 2, 3, 4))).lower(drawn.x, router, *drawn[3:])
    # Before XLA's passes: its CPU backend gathers in float32 whatever is asked.
    asked = [line for line in lowered.as_text().splitlines() if "stablehlo.all_gather" in line]
    assert asked and all("bf16" in line and "f32" not in line for line in asked)
    gathered = [line for line in str(lowered.compile().as_text()).splitlines() if " all-gather(" in line]
    kernels = (f"[{E},{D},{F // 2}]", f"[{E},{F // 2},{D}]")
    assert gathered and all(any(shape in line for shape in kernels) for line in gathered)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_takes_the_likeliest_and_its_gradient_is_that_of_the_formula(x64, normalize):
    x, *_ = draw(dtype=jnp.float64)
    router = draw(tokens=D, width=E, dtype=jnp.float64, seed=1).x
    slope = jnp.asarray(np.cos(np.arange(3 * N)).reshape(N, 3))

    def loss(router):
        weights, *others = route(x, router, top_k=3, normalize=normalize)
        return jnp.sum(weights * slope), (weights, *others)

    run = jit(jax.value_and_grad(loss, has_aux=True))
    (_, (weights, chosen, probabilities)), grad = run(router)
    exact = np.exp(np.asarray(x) @ np.asarray(router))
    exact = exact / exact.sum(-1, keepdims=True)
    order = np.argsort(-exact, axis=1)[:, :3]
    top = np.take_along_axis(exact, order, axis=1)
    expected = top / top.sum(-1, keepdims=True) if normalize else top
    np.testing.assert_array_equal(chosen, order)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_allclose(probabilities, exact, rtol=1e-12)

    step = 1e-6 * np.sin(np.arange(router.size)).reshape(router.shape)
    moved = (run(router + step)[0][0] - run(router - step)[0][0]) / 2
    np.testing.assert_allclose(np.sum(np.asarray(grad) * step), moved, rtol=1e-6)


def test_router_of_bfloat16_has_float32_probabilities():
    x, *_ = draw(dtype=jnp.bfloat16)
    router = jnp.ones((D, 512), jnp.bfloat16)
    weights, _, probabilities = jit(functools.partial(route, top_k=K, normalize=False))(x, router)
    assert weights.dtype == jnp.bfloat16 and probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


def test_load_counts_the_assignments_of_real_tokens():
    chosen, real = jnp.array([[0, 1], [0, 2], [3, 1]]), jnp.array([True, True, False])
    np.testing.assert_allclose(router_load(chosen, real, 4), [0.5, 0.25, 0.25, 0])
    np.testing.assert_allclose(router_load(chosen, None, 4), [2 / 6, 2 / 6, 1 / 6, 1 / 6])
    np.testing.assert_array_equal(router_load(chosen, jnp.zeros(3, bool), 4), np.zeros(4))


def test_balance_loss_of_even_routing_is_the_number_of_choices():
    chosen = jnp.array([[0, 1], [2, 3], [1, 2], [3, 0]])
    np.testing.assert_allclose(balance_loss(jnp.full((4, 4), 0.25), chosen, None), 2)
    assert balance_loss(jnp.full((4, 4), 0.25), chosen, jnp.zeros(4, bool)) == 0


def peer(family: str):
    """Returns a block of transformers with random weights, and whether its router normalizes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = dict(hidden_size=D, num_experts_per_tok=K, num_attention_heads=2, num_key_value_heads=2)
    name, config, normalized = {
        "mixtral": ("Mixtral", dict(num_local_experts=E, intermediate_size=F), True),
        "qwen3_moe": ("Qwen3Moe", dict(num_experts=E, moe_intermediate_size=F, norm_topk_prob=True), True),
        "olmoe": ("Olmoe", dict(num_experts=E, intermediate_size=F, norm_topk_prob=False), False),
    }[family]
    block = getattr(module, f"{name}SparseMoeBlock")(getattr(transformers, f"{name}Config")(**sizes, **config))
    return block, normalized


@pytest.mark.parametrize("family, block", [("mixtral", 16), ("qwen3_moe", None), ("olmoe", 16)])
def test_block_parity_with_transformers(family, block):
    torch = pytest.importorskip("torch")
    theirs, normalized = peer(family)
    rng = np.random.default_rng(3)
    for parameter in theirs.parameters():
        parameter.data = torch.tensor(rng.normal(size=parameter.shape) / 4, dtype=torch.float32)
    x = rng.normal(size=(4, 10, D)).astype(np.float32)
    given = torch.tensor(x, requires_grad=True)
    out = theirs(given)
    slope = np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)
    (out * torch.tensor(slope)).sum().backward()
    params = {name: (p.detach().numpy(), p.grad.numpy()) for name, p in theirs.named_parameters()}

    def split(both, down, router):
        return router.T, np.swapaxes(both[:, :F], 1, 2), np.swapaxes(both[:, F:], 1, 2), np.swapaxes(down, 1, 2)

    names = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    ours, grads = (split(*(params[name][i] for name in names)) for i in range(2))

    def run(x, router, gate, up, down):
        weights, chosen, _ = route(x, router, top_k=K, normalize=normalized)
        y = mixture(x, weights, chosen, gate, up, down, MixtureOptions(silu, block))
        return jnp.sum(y * slope.reshape(-1, D)), y

    with jax.default_matmul_precision("highest"):
        found, y = jit(jax.grad(run, (0, 1, 2, 3, 4), has_aux=True))(
            jnp.asarray(x.reshape(-1, D)), *map(jnp.asarray, ours)
        )
    assert given.grad is not None
    np.testing.assert_allclose(y, out.detach().numpy().reshape(-1, D), atol=1e-5)
    for one, other in zip(found, (given.grad.numpy().reshape(-1, D), *grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_parity_with_transformers(masked):
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    x, *_ = draw()
    router = draw(tokens=D, width=E, seed=1).x
    real = np.arange(N) % 3 > 0
    _, chosen, probabilities = jit(functools.partial(route, top_k=K, normalize=True))(x, router)
    ours = balance_loss(probabilities, chosen, jnp.asarray(real) if masked else None)
    mask = torch.tensor(real.reshape(4, 10)) if masked else None
    theirs = mixtral.load_balancing_loss_func((torch.tensor(np.asarray(x @ router)),), E, K, mask)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
