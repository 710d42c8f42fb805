"""Recipes for pods, compiled for the topologies that they are meant for: they fit, and send what the design says."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import flags
from dpo_jax.cost import roofline
from dpo_jax.plan import command, estimate
from dpo_jax.plan.topology import devices_of, parse_topology
from dpo_jax.runtime import hosts
from dpo_jax.types import InputError

ROOT = Path(__file__).parents[1]
# Llama 3 8B on v5p:4x4x4 is not among them: its mesh is that of v6e:8x8, where it fits in a third of the memory, and
# that chip's programs are those of Qwen3 8B.
PODS = [
    ("v5e:16x16", "llama3_8b", ["mesh.tensor=8"]),
    ("v6e:8x8", "llama3_8b", []),
    ("v5p:4x4x4", "qwen3_8b", []),
    ("v5p:8x8x8", "llama3_70b", []),
    ("v5e:4x4", "pythia_2b8_hh", []),
]

# Where scoring is compiled as well; for the others its memory, less than the update's, is counted from shapes.
SCORED = {"v6e:8x8", "v5e:4x4"}

pytestmark = pytest.mark.tpu_aot


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        devices_of(parse_topology("v5e:2x2"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def count_scoring(monkeypatch):
    """Returns a function after which scoring is counted from shapes, as for GPUs, and the update alone is compiled."""
    part_of = estimate.part_of

    def counted(topology, programs, lengths, name, shape, program, arguments):
        return part_of(topology, programs, lengths, name, shape, program if name == "update" else None, arguments)

    return lambda: monkeypatch.setattr(estimate, "part_of", counted)


@pytest.mark.parametrize("topology, name, overrides", PODS)
def test_recipe_compiles_for_a_pod_and_fits_and_sends_what_it_should(topology, name, overrides, count_scoring):
    if topology not in SCORED:
        count_scoring()
    found = estimate.estimate(flags.load(f"configs/{name}.py", overrides), parse_topology(topology))
    model = assert_fits_and_sends_weights_alone(found)

    # Neither logits nor the whole vocabulary cross: no array is half of what a device has of its matrix.
    table = model.vocab_size * model.width / found.mesh["tensor"]
    for each in found.parts["update"].moved:
        assert max(map(elements, each.shape.split(", "))) < table / 2, each


def test_experts_compile_for_a_pod_where_tokens_stay_and_take_what_is_counted(count_scoring):
    count_scoring()
    chosen = flags.load("configs/llama3_8b.py", ["plan.architecture=configs/architectures/mixtral_8x7b.json"])
    found = estimate.estimate(chosen, parse_topology("v5p:4x4x4"))
    model = assert_fits_and_sends_weights_alone(found)
    update, tensor = found.parts["update"], found.mesh["tensor"]

    assert not any(each.kind.startswith("ragged") for each in update.moved)  # no token goes where its expert is
    # What is gathered or scattered is no larger than dense weights, or is a matrix of all experts, or its gradient.
    sides = {model.width, model.width // found.mesh["fsdp"], model.mlp_width // tensor}
    part = model.experts * model.width * model.mlp_width / tensor / found.mesh["fsdp"]
    for each in update.moved:
        *_, experts, first, second = 0, 0, 0, *map(int, re.findall(r"\d+", each.shape.partition("[")[2]))
        tokens = first == model.vocab_size  # their gradient, summed for part of the width at a time
        if each.kind in ("all-gather", "reduce-scatter") and elements(each.shape) >= part and not tokens:
            assert experts == model.experts and {first, second} <= sides, each
            assert each.shape.startswith("bf16" if each.kind == "all-gather" else "f32"), each

    # GPUs are planned for by counting: what the compiler finds is not far from it.
    gathered = 2 * 46.7e9 / tensor  # bytes of all parameters, of which a chip has its part of `tensor`
    counted = roofline.activation_bytes(model, update.shape.row_length, tensor=tensor, itemsize=2, remat="dots")
    counted += roofline.weight_bytes(model, gathered, itemsize=2, trained=gathered)
    assert 0.75 < counted / update.memory.rest < 1.25


def assert_fits_and_sends_weights_alone(found):
    """Checks all but what depends on how large the vocabulary is beside the rest; returns the model's shape."""
    assert found.fits and command.verdict(found).startswith("fits: ")
    assert found.attention == "splash"
    model = estimate.architecture(found.config)
    update, tensor = found.parts["update"], found.mesh["tensor"]
    microbatches = round(update.work.microbatches)

    # Weights are gathered in bfloat16, forward and backward, and nothing else of that size is.
    gathered = sum(each.bytes_sent * each.times for each in update.moved if each.kind == "all-gather")
    mlp = (3 if model.gated else 2) * model.width * model.mlp_width * max(1, model.experts)
    block = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads) + mlp
    weights = 2 * model.layers * block / tensor * microbatches
    assert gathered < 2.6 * weights

    # Nor do the devices of `tensor` gather in any layer: each has its own heads, and its part of the MLP.
    rows = update.shape.row_length * model.width
    for each in update.moved:
        over_tensor = len(each.groups[0]) == tensor != found.mesh["fsdp"]
        if each.kind == "all-gather" and over_tensor and each.times > microbatches:
            assert max(map(elements, each.shape.split(", "))) < rows / tensor, each

    # Rows stay on their devices from the first layer to the last and back; what moves of them is embedded tokens.
    activations = update.shape.positions * model.width * 2 / update.shape.shards
    moved = sum(each.bytes_sent * each.times for each in update.moved if each.kind == "all-to-all")
    assert moved < 8 * microbatches * activations
    assert all(each.times <= 4 * microbatches for each in update.moved if each.kind == "all-to-all")
    return model


def elements(array):
    """Of `bf16[1,4096]`."""
    return math.prod(int(size) for size in re.findall(r"\d+", array.partition("[")[2]))


def test_adapters_fit_where_the_model_could_not_train(count_scoring):
    """Their products are not kept beside those of the kernels, and codes are decoded one layer at a time.

    That scoring decodes them so too is in test_quantized.py.
    """

    def of(*overrides):
        chosen = flags.load("configs/llama3_8b.py", ["mesh.tensor=1", "model.param_dtype=bfloat16", *overrides])
        return estimate.estimate(chosen, parse_topology("v5e:2x4"))

    count_scoring()
    adapters, coded = of("lora.rank=16"), of("lora.rank=16", "lora.base=nf4")
    assert adapters.fits and coded.fits
    beside, held = (found.parts["update"].memory for found in (adapters, coded))
    # Two float32 moments of all that there is would take four times what its weights take in bfloat16.
    assert beside.optimizer < 4 * beside.weights / 20 and held.weights < beside.weights / 2
    assert held.rest < 1.1 * beside.rest


def test_plan_that_does_not_fit_its_pod_says_so():
    overrides = ["mesh.tensor=1", "train.microbatch_rows=64", "model.remat=none"]
    overrides += ["loss.name=simpo"]  # which needs no scoring program: the update is compiled alone
    chosen = flags.load("configs/llama3_8b.py", overrides)
    found = estimate.estimate(chosen, parse_topology("v5e:4x4"))
    assert not found.fits and found.bytes > found.topology.chip.hbm_bytes
    assert command.verdict(found).startswith("does not fit: ")


def test_an_installed_libtpu_says_nothing_where_there_is_no_tpu():
    code = "from dpo_jax.runtime import hosts; hosts.join(); import jax; print(jax.devices()[0].platform)"
    told = {*hosts.WITHOUT_TPU, "JAX_PLATFORMS"}  # by other tests, in this process
    untold = {name: value for name, value in os.environ.items() if name not in told}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=untold)
    assert ran.stdout.strip() != "tpu" and ran.stderr == ""
