"""Quantized frozen models: rounding error, memory, and runs that train adapters on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import commands, train, trees
from dpo_jax.losses import make_loss
from dpo_jax.models import decoder, quantized, rope
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.run import checks, state
from dpo_jax.types import InputError
from tests.support.memory import temporary_bytes
from tests.support.runs import load_inputs, make_config, make_inputs, make_programs, read_rows

SHAPES = [(2, 128, 4, 64), (2, 4, 24, 96), (3, 5, 64, 80)]


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="the quantize extra")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "lost"), [("int8", 8, 0.01), ("nf4", 4, 0.1)])
def test_decoded_kernels_are_near_the_originals(qwix, shape, kind, bits, lost):
    """NormalFloat's 16 levels leave 9% of normal numbers' size in error, 8 bits leave less than bfloat16's rounding
    of their products does."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, shape), jnp.float32)
    encoded = quantized.encode(kernel, kind)
    assert encoded["codes"].nbytes * 8 == kernel.size * bits
    assert encoded["scales"].size * min(shape[-1], 16) <= kernel.size
    again = quantized.decode(encoded)
    assert again.dtype == kernel.dtype and again.shape == shape
    error = float(jnp.sqrt(jnp.mean((again - kernel) ** 2)) / jnp.std(kernel))
    assert lost / 20 < error < lost
    # Decoding one layer, as a scan does, equals decoding all of them.
    one = quantized.decode(jax.tree.map(lambda x: x[1], encoded))
    np.testing.assert_array_equal(one, again[1])


def test_leaves_that_can_be_quantized_are_the_kernels_of_blocks():
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
def test_adapters_train_on_a_quantized_model(qwix, kind, inputs, tmp_path):
    """The quantized model is its own reference; the merged model equals the trained one, with decoded kernels."""
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


def test_memory_of_quantized_parameters(qwix, inputs):
    """Abstract and loaded parameters are the same tree, of a quarter of the bytes of float32 for matrices in int8."""
    sizes: dict = {}
    for kind in ("", "int8"):
        config = make_config(inputs, lora__rank=2, lora__base=kind)
        found = load_inputs(config, training=True)
        built = make_programs(config, found, trainable=found.trainable)
        params = state.load_params(found.source, built)
        trained, frozen = found.trainable.split(params)
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


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_scoring_decodes_the_codes_of_one_layer_at_a_time(qwix, kind):
    def encode(kernel):
        return quantized.encode(kernel, kind)

    def temporaries(layers):
        shape = DecoderConfig(
            vocab_size=64,
            width=128,
            layers=layers,
            heads=4,
            kv_heads=4,
            head_dim=32,
            mlp_width=512,
            max_positions=64,
            kinds=(LayerKind(rope.usual(32)),),
        )
        params = trees.flatten(jax.eval_shape(lambda: decoder.init(jax.random.key(0), shape)))
        kernels = [path for path in params if quantized.KERNEL.match(path)]
        params |= {path: jax.eval_shape(encode, params[path]) for path in kernels}
        rows = [jax.ShapeDtypeStruct((1, 16), jnp.int32)] * 4

        def score(params, *rows):
            return decoder.forward(params, shape, *rows, options=decoder.BlockOptions(jnp.dtype("float32"))).sum()

        return temporary_bytes(jax.jit(score), trees.nest(params), *rows)

    two, twelve, one_kernel = temporaries(2), temporaries(12), 4 * 128 * 512
    assert two > one_kernel and twelve - two < one_kernel


def test_missing_qwix_is_an_error_before_a_device_is_touched(monkeypatch, inputs):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantize"):
        checks.check_names(make_config(inputs, lora__rank=2, lora__base="int8"), make_loss("sigmoid", {}))
