"""Optimizers and schedules against their formulas, and against torch and transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import config, optim
from dpo_jax.run import choices
from dpo_jax.types import InputError

PEAK, WARMUP, TOTAL = 1e-2, 3, 10


def make(**changes):
    fields = {"learning_rate": PEAK, "schedule": "constant", "clip_norm": 0.0} | changes
    options = dataclasses.asdict(config.Optimizer(**fields))
    del options["layer_decay"], options["warmup_ratio"]  # which need a model and the number of updates
    return optim.make_optimizer(**options, total_steps=TOTAL)


@pytest.fixture
def problem():
    """Parameters of two stacked blocks, and six gradients of growing size."""
    draw = np.random.default_rng(0)
    shapes = {"kernel": (2, 4, 3), "bias": (2, 3), "scale": (2, 4)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [
        {name: (step + 1) * draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for step in range(6)
    ]
    return {"blocks": params}, [{"blocks": each} for each in grads]


def run(tx, params, grads):
    """Parameters after every update, as the jitted train step makes them."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for grad in grads:
        params, state = step(params, state, grad)
        history.append(params)
    return history


def adamw(params, grads, *, rates, b1, b2, eps, weight_decay, clip_norm, no_decay=("bias", "scale")):
    """torch.optim.AdamW and clip_grad_norm_, transcribed in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in grad.values()))
        coefficient = min(1.0, clip_norm / (norm + 1e-6))
        for name, g in grad.items():
            g = coefficient * g.astype(np.float64)
            params[name] *= 1 - rate * (0 if name in no_decay else weight_decay)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            denominator = np.sqrt(v[name]) / np.sqrt(1 - b2**t) + eps
            params[name] -= rate / (1 - b1**t) * m[name] / denominator
    return params


def test_adamw_equals_its_formula(problem):
    params, grads = problem
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.3, "clip_norm": 12.0}
    norms = [float(optax.tree.norm(grad)) for grad in grads]
    assert norms[0] < options["clip_norm"] < norms[-1], "clips some and not others"
    tx, rate = make(schedule="linear", warmup_steps=WARMUP, **options)
    rates = [PEAK * t / 3 for t in range(3)] + [PEAK * (10 - t) / 7 for t in range(3, 6)]
    expected = adamw(params["blocks"], [grad["blocks"] for grad in grads], rates=rates, **options)
    found = run(tx, params, grads)[-1]["blocks"]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose([rate(t) for t in range(6)], rates, rtol=1e-6)


TORCH = {
    "adamw": ({"b1": 0.8, "b2": 0.95, "eps": 1e-6}, "AdamW", {"betas": (0.8, 0.95), "eps": 1e-6}),
    "rmsprop": ({"b2": 0.99, "eps": 1e-2}, "RMSprop", {"alpha": 0.99, "eps": 1e-2}),  # large: where it is added shows
    "sgd": ({"b1": 0.8}, "SGD", {"momentum": 0.8}),
}


@pytest.mark.parametrize("name", TORCH)
def test_optimizer_parity_with_torch(problem, name):
    torch = pytest.importorskip("torch")
    params, grads = problem
    ours, theirs, options = TORCH[name]
    tx, rate = make(name=name, clip_norm=12.0, schedule="cosine", warmup_steps=WARMUP, **ours)
    # No decay: outside AdamW, torch's weight_decay is an L2 penalty, another thing.
    tensors = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in params["blocks"].items()}
    optimizer = getattr(torch.optim, theirs)(tensors.values(), lr=PEAK, weight_decay=0.0, **options)
    for step, (grad, found) in enumerate(zip(grads, run(tx, params, grads), strict=True)):
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(grad["blocks"][key])
        torch.nn.utils.clip_grad_norm_(tensors.values(), 12.0)
        optimizer.param_groups[0]["lr"] = float(rate(step))
        optimizer.step()
        for key, tensor in tensors.items():
            np.testing.assert_allclose(found["blocks"][key], tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", optim.DECAYS)
@pytest.mark.parametrize("warmup, total", [(0, 7), (3, 10), (10, 10), (20, 10)])
def test_schedule_parity_with_transformers(name, warmup, total):
    torch = pytest.importorskip("torch")
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    steps = {} if name == "constant" else {"num_training_steps": total}
    make_theirs = getattr(optimization, f"get_{name}_schedule_with_warmup")
    theirs = make_theirs(optimizer, num_warmup_steps=warmup, **steps)
    ours = optim.make_schedule(name, PEAK, warmup_steps=warmup, total_steps=total)
    for step in range(total):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-9)
        optimizer.step()
        theirs.step()


def test_schedule_with_a_floor_has_parity_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, WARMUP, TOTAL, min_lr_rate=0.1)
    ours = optim.make_host_schedule("cosine", PEAK, warmup_steps=WARMUP, total_steps=TOTAL, min_lr_rate=0.1)
    for step in range(TOTAL + 1):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-9)
        optimizer.step()
        theirs.step()


def test_schedules_equal_their_formulas():
    t = np.arange(TOTAL)
    warm, done = t / WARMUP, (t - WARMUP) / (TOTAL - WARMUP)
    after = {"constant": np.ones(TOTAL), "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}
    for name, decay in after.items():
        rate = optim.make_schedule(name, PEAK, warmup_steps=WARMUP, total_steps=TOTAL)
        expected = PEAK * np.where(t < WARMUP, warm, decay)
        np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(TOTAL)), expected, rtol=1e-5)
    assert set(after) == set(optim.DECAYS)
    rate = optim.make_host_schedule("linear", PEAK, warmup_steps=WARMUP, total_steps=TOTAL, min_lr_rate=0.25)
    expected = PEAK * np.where(t < WARMUP, warm, 0.25 + 0.75 * (1 - done))
    np.testing.assert_allclose([rate(int(step)) for step in t], expected, rtol=1e-5)
    with pytest.raises(InputError, match="config.optimizer.min_lr_rate: 0.25, and the schedule 'constant'"):
        make(min_lr_rate=0.25)


def test_warmup_may_be_a_share_of_all_updates():
    fields = {"learning_rate": PEAK, "schedule": "linear"}
    of_steps = choices.optimizer_of(config.Optimizer(**fields, warmup_steps=3), total_steps=11)[1]
    of_ratio = choices.optimizer_of(config.Optimizer(**fields, warmup_ratio=0.2), total_steps=11)[1]
    assert [of_ratio(step) for step in range(12)] == [of_steps(step) for step in range(12)]


SCHEDULES = [(1e-2, 3, 10), (5e-7, 150, 1000), (1e-6, 0, 777), (3e-5, 20, 10), (1e-4, 7, 1501)]


@pytest.mark.parametrize("name", optim.DECAYS)
@pytest.mark.parametrize("peak, warmup, total", SCHEDULES)
def test_logged_learning_rate_is_that_of_the_compiled_schedule(name, peak, warmup, total):
    options = {"warmup_steps": warmup, "total_steps": total}
    schedule = lambda peak, numbers, step: optim.make_schedule(name, peak, **numbers)(step)
    device = lambda steps: jax.jit(jax.vmap(schedule, in_axes=(None, None, 0)))(peak, options, steps)
    host = optim.make_host_schedule(name, peak, **options)
    expected, found = device(jnp.arange(total + 2)), [host(t) for t in range(total + 2)]
    # A cosine has another last bit in XLA than in numpy, in a factor of at most the peak.
    atol = np.spacing(np.float32(peak)) if name == "cosine" else 0.0
    np.testing.assert_allclose(np.array(found, np.float32), expected, rtol=0, atol=atol)
    assert np.array_equal(found, np.array(found, np.float32)), "float32 values"


@pytest.mark.parametrize("name", optim.DECAYS)
def test_logged_learning_rate_uses_no_device(name):
    _, rate = make(schedule=name, warmup_steps=WARMUP)
    arrays = len(jax.live_arrays())
    with jax.transfer_guard("disallow_explicit"):
        rates = [rate(t) for t in range(TOTAL)]
    assert {type(each) for each in rates} == {float}
    assert len(jax.live_arrays()) == arrays


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_numbers_may_be_traced(problem, name):
    params, grads = problem
    options = {"name": name, "schedule": "linear", "warmup_steps": WARMUP, "clip_norm": 12.0, "weight_decay": 0.3}
    tx, _ = make(**options)
    own = {"b1", "b2", "eps"} & optim.OPTIMIZERS[name][1].keys()
    of_schedule = {"learning_rate", "warmup_steps", "total_steps", "min_lr_rate"}
    assert tx.numbers.keys() == own | of_schedule | {"clip_norm", "weight_decay"}
    assert make(name=name)[0].numbers.keys() == own | of_schedule

    @jax.jit
    def last(numbers):
        tx, trained = make(**options)[0].with_numbers(numbers), params
        state = tx.init(params)
        for grad in grads[:2]:
            updates, state = tx.update(grad, state, trained)
            trained = optax.apply_updates(trained, updates)
        return trained

    found, expected = last(tx.numbers), run(tx, params, grads[:2])[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-6), found, expected)
    for option in tx.numbers.keys() - {"clip_norm", "eps", "total_steps", "min_lr_rate"}:
        changed = last(tx.numbers | {option: 0.5 * tx.numbers[option] if option != "warmup_steps" else 2})
        if (name, option) in {("lion", "b1"), ("lion", "b2")}:  # which takes the sign
            continue
        assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), changed, found))) > 1e-6, option


def test_lion_equals_its_formula(problem):
    params, grads = problem
    tx, _ = make(name="lion", b1=0.9, b2=0.99, weight_decay=0.1)
    value, m = params["blocks"]["kernel"].astype(np.float64), 0.0
    for grad in (each["blocks"]["kernel"] for each in grads):
        value = value - PEAK * (np.sign(0.9 * m + 0.1 * grad) + 0.1 * value)
        m = 0.99 * m + 0.01 * grad
    np.testing.assert_allclose(run(tx, params, grads)[-1]["blocks"]["kernel"], value, rtol=1e-5, atol=1e-7)


def test_adafactor_factors_large_matrices_and_takes_relative_steps():
    """At the first update the second moment is the squared gradient; a matrix keeps only its row and column means."""
    draw = np.random.default_rng(0)
    params = {"small": draw.normal(size=(4, 3)), "large": draw.normal(size=(2, 128, 256))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    grads = {name: draw.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
    tx, _ = make(name="adafactor")
    found = run(tx, params, [grads])[-1]

    def relative_step(param, direction):
        rms = np.sqrt(np.mean(np.square(direction)))
        return param - PEAK * np.sqrt(np.mean(np.square(param))) * direction / max(1, rms)

    square = np.square(grads["large"].astype(np.float64))
    rows, columns = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
    direction = grads["large"] / np.sqrt(rows * columns / rows.mean(-2, keepdims=True))
    np.testing.assert_allclose(found["large"], relative_step(params["large"], direction), rtol=2e-5, atol=1e-6)
    expected = relative_step(params["small"], np.sign(grads["small"]))
    np.testing.assert_allclose(found["small"], expected, rtol=2e-5, atol=1e-6)
    held = sum(leaf.size for leaf in jax.tree.leaves(tx.init({"large": params["large"]})))
    assert held < 0.02 * params["large"].size


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_is_decoupled_and_spares_scales_and_biases(problem, name):
    """Decay changes an update by exactly -rate * decay * parameter, whatever the optimizer."""
    params, grads = problem
    with_decay, without = (run(make(name=name, weight_decay=d)[0], params, grads[:1])[0] for d in (0.5, 0.0))
    difference = jax.tree.map(lambda a, b: a - b, with_decay, without)["blocks"]
    np.testing.assert_allclose(difference["kernel"], -PEAK * 0.5 * params["blocks"]["kernel"], rtol=1e-3, atol=1e-6)
    assert not np.any(difference["bias"]) and not np.any(difference["scale"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_and_updates_are_float32_for_bfloat16_parameters(problem, name):
    params, grads = problem
    half, grad = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), (params, grads[0]))
    tx, _ = make(name=name, weight_decay=0.1, clip_norm=1.0)
    updates, state = jax.eval_shape(tx.update, grad, jax.eval_shape(tx.init, half), half)
    types = {leaf.dtype for leaf in jax.tree.leaves((updates, state)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert types == {jnp.dtype("float32")}
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(jnp.shape, params)


def test_bfloat16_gradients_are_clipped_in_float32(problem):
    params, grads = problem
    half = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), grads[-1])
    tx, _ = make(name="sgd", clip_norm=1.0)
    (found,), (expected,) = run(tx, params, [half]), run(tx, params, [optax.tree.cast(half, jnp.float32)])
    np.testing.assert_array_equal(found["blocks"]["kernel"], expected["blocks"]["kernel"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_keeps_its_structure_and_types_over_updates(problem, name):
    """A checkpoint of any step restores into the state of a new run."""
    params, grads = problem
    tx, _ = make(name=name, weight_decay=0.1, clip_norm=1.0)
    first = jax.eval_shape(tx.init, params)
    _, second = jax.eval_shape(tx.update, grads[0], first, params)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(first)] == [(x.shape, x.dtype) for x in jax.tree.leaves(second)]


def test_the_first_update_of_a_warm_up_changes_nothing(problem):
    params, grads = problem
    first, second = run(make(warmup_steps=2)[0], params, grads[:2])
    np.testing.assert_array_equal(first["blocks"]["kernel"], params["blocks"]["kernel"])
    assert np.abs(second["blocks"]["kernel"] - first["blocks"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize(
    "changes, place, part",
    [
        ({"name": "adam"}, "config.optimizer.name", "adamw, adafactor, rmsprop, lion, sgd"),
        ({"schedule": "polynomial"}, "config.optimizer.schedule", "constant, linear, cosine"),
        ({"name": "sgd", "b2": 0.99}, "config.optimizer.b2", "the default 0.999"),
        ({"name": "rmsprop", "b1": 0.5}, "config.optimizer.b1", "the default 0.9"),
        ({"name": "lion", "eps": 1e-6}, "config.optimizer.eps", "the default 1e-08"),
        ({"name": "adafactor", "b1": 0.0}, "config.optimizer.b1", "the default 0.9"),
    ],
)
def test_unknown_names_and_options_without_effect_are_refused(changes, place, part):
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert caught.value.place == place
    assert part in caught.value.expected


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_accepted_option_changes_the_updates(problem, name):
    params, grads = problem
    # A first gradient that outweighs the next ones, or every mean has the sign of the newest.
    grads = [jax.tree.map(lambda g: 30 * g, grads[0]), *grads[1:3]]
    plain = run(make(name=name)[0], params, grads)[-1]
    others = {"b1": 0.5, "b2": 0.5, "eps": 1e-1}
    for option in optim.OPTIMIZERS[name][1]:
        changed = run(make(name=name, **{option: others[option]})[0], params, grads)[-1]
        assert np.abs(changed["blocks"]["kernel"] - plain["blocks"]["kernel"]).max() > 1e-5, option
