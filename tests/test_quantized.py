"""Frozen models in few bits: what is lost, what is held, and runs that train adapters on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import commands, train, trees
from dpo_jax.losses import make_loss
from dpo_jax.models import quantized
from dpo_jax.run import checks, state
from dpo_jax.types import InputError
from tests.support.runs import load_inputs, make_config, make_inputs, make_programs, read_rows

SHAPES = [(2, 128, 4, 64), (2, 4, 24, 96), (3, 5, 64, 80)]


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="the quantize extra")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "lost"), [("int8", 8, 0.01), ("nf4", 4, 0.1)])
def test_kernels_come_back_nearly_as_they_were(qwix, shape, kind, bits, lost):
    """NormalFloat's 16 levels leave 9% of normal numbers' size in error, 8 bits leave less than bfloat16's rounding
    of their products does."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, shape), jnp.float32)
    held = quantized.encode(kernel, kind)
    assert held["codes"].nbytes * 8 == kernel.size * bits
    assert held["scales"].size * min(shape[-1], 16) <= kernel.size
    again = quantized.decode(held)
    assert again.dtype == kernel.dtype and again.shape == shape
    error = float(jnp.sqrt(jnp.mean((again - kernel) ** 2)) / jnp.std(kernel))
    assert lost / 20 < error < lost
    # A layer at a time as all at once, as a scan takes them.
    one = quantized.decode(jax.tree.map(lambda x: x[1], held))
    np.testing.assert_array_equal(one, again[1])


def test_leaves_that_can_be_held_so_are_the_matrices_of_blocks():
    can = "blocks/attention/q/kernel blocks/mlp/down/kernel blocks/experts/gate/kernel".split()
    cannot = "embed/embedding blocks/experts/router/kernel blocks/mlp/up/bias blocks/attention/q/lora_a".split()
    assert all(map(quantized.KERNEL.fullmatch, can)) and not any(map(quantized.KERNEL.fullmatch, cannot))
    assert quantized.leaf_of("blocks/mlp/up/kernel/codes") == "blocks/mlp/up/kernel"
    assert quantized.leaf_of("blocks/mlp/up/bias") == "blocks/mlp/up/bias"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("quantized") / "inputs")


@pytest.mark.slow
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_adapters_train_on_a_model_in_few_bits(qwix, kind, inputs, tmp_path):
    """It is its own reference; the merged model is the one that trained, matrices as decoded."""
    config = make_config(inputs, lora__rank=2, lora__base=kind)
    train.run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run/eval.jsonl")
    assert rows[0]["eval/rewards/margins"] == 0 and rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len({row["loss"] for row in read_rows(tmp_path / "run/metrics.jsonl")}) > 2
    commands.export_checkpoint(config, tmp_path / "run", tmp_path / "merged", merge=True)
    merged = make_config(inputs, model__path=str(tmp_path / "merged"), train__steps=1, loss__name="sft")
    train.run(merged, tmp_path / "again")
    after = read_rows(tmp_path / "again/eval.jsonl")[0]
    assert after["eval/logps/chosen"] == pytest.approx(rows[-1]["eval/logps/chosen"], rel=1e-6)
    plain = make_config(inputs, lora__rank=2, reference__path=str(tmp_path / "run/reference"))
    with pytest.raises(InputError, match="base"):
        commands.score_reference(plain, tmp_path)


def test_what_is_held_is_counted(qwix, inputs):
    """Abstract and loaded parameters are the same tree, of a quarter of the bytes of float32 for matrices in int8."""
    sizes: dict = {}
    for kind in ("", "int8"):
        config = make_config(inputs, lora__rank=2, lora__base=kind)
        found = load_inputs(config, training=True)
        built = make_programs(config, found, selection=found.selection)
        params = state.load_params(found.source, built)
        trained, frozen = found.selection.split(params)
        expected = state.abstract_params(built)
        for ours, theirs in zip((trained, frozen), expected, strict=True):
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), ours) == jax.tree.map(
                lambda x: (x.shape, x.dtype, x.sharding), theirs
            )
        assert all("lora_" in path for path in trees.flatten(trained))
        by_path = trees.flatten(frozen)
        held = [x for path, x in by_path.items() if quantized.KERNEL.match(path)]
        sizes[kind] = sum(x.nbytes for x in held) if kind else held
        if kind:
            assert {path.rpartition("/")[2] for path in by_path if "/kernel" in path} == {"codes", "scales"}
    one, many = sizes[""], sizes["int8"]
    assert many == sum(x.size + 4 * x.size // math.gcd(x.shape[-1], 64) for x in one) < sum(x.nbytes for x in one) / 2


def test_without_qwix_it_is_said_before_a_device_is_touched(monkeypatch, inputs):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantize"):
        checks.check_names(make_config(inputs, lora__rank=2, lora__base="int8"), make_loss("sigmoid", {}))
