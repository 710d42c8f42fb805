"""Frozen parameters cost no gradient, neither in the operations counted nor in the compiled update."""

import json
import math
import re

import jax
import numpy as np
import pytest

from dpo_jax import config
from dpo_jax.cost import flops
from dpo_jax.hf import tensors
from dpo_jax.hf.families import family
from dpo_jax.plan import estimate
from dpo_jax.run import choices, programs
from dpo_jax.run.state import abstract_params, abstract_state
from dpo_jax.trees import flatten
from tests.support.family_cases import CASES

LENGTHS = np.array([[20, 10, 12], [16, 9, 9]])
# Sizes that differ from every number of positions, of lines in a block and of tokens in a block.
SIZES = dict(hidden_size=40, intermediate_size=56, vocab_size=94, num_hidden_layers=2)
KERNEL = re.compile(r"blocks/.*/kernel")


def case(name, **changes):
    """Configuration and table of a small model, and shapes of its parameters by path."""
    kind, hf = CASES[name]
    hf = dict(hf, model_type=kind) | changes
    model = family(hf, name).decoder_config(hf, name)
    table = family(hf, name).tensors(model)
    shapes = tensors.leaf_shapes(table, model.stacks)
    return model, table, shapes


def chosen(**fields):
    return config.freeze(config_of(fields))


def config_of(fields):
    made = config.base()
    made.model.path, made.data.train = "a folder", "a file"
    with made.ignore_type():
        made.update_from_flattened_dict(fields)
    return made


def shares(name, **fields):
    """Shares of a small model that train, and those whose gradients are computed."""
    model, table, shapes = case(name)
    trainable = choices.trainable_of(chosen(**fields), table, model)
    found = trainable.leaf_shapes(model)
    assert shapes.items() <= found.items()
    return flops.shares_of(model, found, trainable.trained_fraction), flops.shares_of(model, found, trainable.trains)


@pytest.mark.parametrize("name", CASES)
def test_share_of_a_kernel_is_that_of_its_operations(name):
    model, _, shapes = case(name)
    assert flops.shares_of(model, shapes, lambda path: 1.0) == flops.WHOLE
    for path in filter(KERNEL.fullmatch, shapes):
        size = math.prod(shapes[path])
        if re.search("experts/(gate|up|down)", path):
            size *= model.experts_per_token / model.experts
        found = flops.shares_of(model, shapes, lambda other, path=path: float(other == path))
        assert found.blocks * flops.product_flops(model, 1, 0) == pytest.approx(2 * size), path
        assert found.head == found.adapters == 0


def test_shares_of_layers_and_experts_are_those_that_train():
    whole, _ = shares("mixtral-all", **{"train.freeze": r"embed_tokens"})
    assert whole == flops.Shares(1.0, 0.0, 0.0), "its head is its embedding"
    # One of four layers is frozen; leaves stack all layers, so gradients of all are computed.
    some, made = shares("llama-plain", **{"train.freeze": r"layers\.0\."})
    assert some == flops.Shares(3 / 4, 1.0, 0.0) and made == flops.WHOLE
    model, _, _ = case("mixtral-all")
    one, _ = shares("mixtral-all", **{"train.freeze": r"experts\.1\."})
    of_experts = 2 * model.layers * model.width * model.active_width * 3
    assert 1 - one.blocks == pytest.approx(of_experts / flops.product_flops(model, 1, 0) / model.experts)


def test_adapters_count_the_products_they_need_and_maps_stored_as_one_share_the_first():
    rank = 3
    model, _, _ = case("phi3-plain")  # q, k and v are stored as one, and so are gate and up
    joined = [(32, 32 + 2 * 32), (32, 32), (32, 2 * 48), (48, 32)]
    found, _ = shares("phi3-plain", **{"lora.rank": rank})
    assert found == flops.Shares(0.0, 0.0, 2 * rank * model.layers * sum(map(sum, joined)))
    apart = [(32, 32)] * 4 + [(32, 48)] * 2 + [(48, 32)]
    found, _ = shares("llama-plain", **{"lora.rank": rank})
    assert found.adapters == 2 * rank * model.layers * sum(map(sum, apart))


def test_update_with_adapters_in_closed_form():
    model, _, _ = case("llama-plain")
    found, _ = shares("llama-plain", **{"lora.rank": 3})
    tokens, scored = flops.tokens_of(LENGTHS, "shared")
    products, head = flops.product_flops(model, tokens, 0), flops.product_flops(model, 0, scored)
    attention = flops.forward_flops(model, LENGTHS, "shared") - products - head
    low = found.adapters * tokens
    assert flops.forward_flops(model, LENGTHS, "shared", found) == products + head + attention + low
    assert flops.train_flops(model, LENGTHS, "shared", found) == 2 * (products + head) + 3 * (attention + low)
    headless = flops.Shares(blocks=0.25, head=0.0)
    expected = 2.25 * products + 2 * head + 3 * attention
    assert flops.train_flops(model, LENGTHS, "shared", headless) == pytest.approx(expected)


def compiled(folder, name, sizes, **fields):
    """Text of a compiled update, shapes of one device's shards of the leaves by path, and paths of those that train."""
    kind, hf = CASES[name]
    (folder / "config.json").write_text(json.dumps(dict(hf, model_type=kind) | SIZES))
    fields = {"model.path": str(folder), "train.batch_pairs": 2, "optimizer.name": "sgd"} | fields
    how = chosen(**fields, **{f"mesh.{axis}": size for axis, size in sizes.items()})
    model = estimate.architecture(how)
    trainable = estimate.selected(how, model)
    devices = jax.devices()[: math.prod(sizes.values())]
    built = programs.make_programs(
        how, choices.objective_of(how.loss), model, LENGTHS, trainable=trainable, devices=devices
    )
    tx, _ = choices.optimizer_of(how.optimizer, total_steps=6, trainable=trainable)
    state, (_, frozen) = abstract_state(built, tx), abstract_params(built)
    update = programs.make_update(built, tx, state)
    # The test reads the program that XLA optimized; LLVM's optimizations of its loops do not matter.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    batch = estimate.abstract_batch(built, built.update_shape, update=True)
    program = update.compile(state, frozen, batch, options=quick)
    leaves = flatten(state.params) | flatten(frozen)
    here = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves.items()}
    return program.as_text(), here, set(flatten(state.params))


def made(text, shape):
    """Operations that compute an array of a shape, without those that pass on an existing one."""
    found = re.findall(rf"(\S+) = f32\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", text)
    return {op for name, op in found if "copy" not in name and op not in ("parameter", "get-tuple-element", "bitcast")}


def gradient_products(text, path, shape):
    """Matrix products whose result has the shape of one layer's and one expert's kernel, transposed or not."""
    inner = shape[1 + ("experts/" in path and "router" not in path) :] if path.startswith("blocks/") else shape
    inputs = 2 if path.endswith("attention/o/kernel") else 1
    sides = math.prod(inner[:inputs]), math.prod(inner[inputs:])
    return [side for side in (sides, sides[::-1]) if f"= f32[{side[0]},{side[1]}]" in dots(text)]


def dots(text):
    return "\n".join(line for line in text.splitlines() if " dot(" in line)


def matrices(shapes):
    return [path for path in shapes if KERNEL.fullmatch(path) or path.endswith("embedding")]


ONE = dict(replica=1, fsdp=1, tensor=1)
MESH = dict(replica=1, fsdp=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, MESH], ids=["one", "mesh"])
@pytest.mark.parametrize("name", ["mixtral-all", "llama-plain"])
def test_update_of_adapters_makes_no_gradient_of_what_does_not_train(name, sizes, tmp_path):
    text, shapes, train = compiled(tmp_path, name, sizes, **{"lora.rank": 3})
    assert train and all(path.endswith(("/lora_a", "/lora_b")) for path in train)
    for path in matrices(shapes):
        assert not gradient_products(text, path, shapes[path]), path
        assert sizes == MESH or not made(text, shapes[path]), path  # on a mesh, shards are communicated


@pytest.mark.slow
def test_update_of_all_makes_the_gradients_that_the_tests_of_adapters_look_for(tmp_path):
    text, shapes, train = compiled(tmp_path, "mixtral-all", ONE)
    assert train == set(shapes)
    for path in matrices(shapes):
        assert gradient_products(text, path, shapes[path]), path
        assert made(text, shapes[path]), path
