"""Low-rank adapters: what they compute, what trains, what is written, and what is refused."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import commands, losses, sharding, steps, train, trees
from dpo_jax import config as configs
from dpo_jax.data import layout, packing
from dpo_jax.hf import checkpoints, peft
from dpo_jax.hf.adapters import Adapters, choose, first_values, merge, module_of
from dpo_jax.hf.families import FAMILIES
from dpo_jax.parallel import ModelOptions, Placement
from dpo_jax.run import checks
from dpo_jax.scoring import make_logps_fn
from dpo_jax.types import Encoded, InputError
from tests.support.hf_folders import decoder_config, snapshot
from tests.support.make_golden import JSON, write_folder
from tests.support.runs import STEPS, load_inputs, make_config, make_inputs, read_rows, untimed

GOLDEN = json.loads(JSON.read_text())["cases"]
PAIRS = 4


def table_of(name):
    hf = GOLDEN[name]["config"]
    config = decoder_config(hf)
    return config, FAMILIES[hf["model_type"]].tensors(config)


def adapters_of(name, *, rank=3, alpha=6.0, stabilized=False, targets=""):
    config, table = table_of(name)
    return Adapters(rank, alpha, stabilized, choose(table, config.stacks, targets))


def moved(leaves, seed=0):
    """Adapters as after some training: B no longer 0."""
    rng = np.random.default_rng(seed)
    return {path: (rng.normal(size=leaf.shape) * 0.2).astype(np.float32) for path, leaf in leaves.items()}


def loaded(name, folder, adapters, *, at_start=True):
    """Configuration, what trains and what does not."""
    write_folder(folder, GOLDEN[name])
    config, _ = checkpoints.read_config(folder)
    first = first_values(adapters, config.stacks, seed=0)
    frozen = jax.tree.map(jnp.asarray, checkpoints.load_params(folder, config))
    return config, trees.nest(jax.tree.map(jnp.asarray, first if at_start else moved(first))), frozen


def batch_of(config, rows=4):
    rng = np.random.default_rng(0)
    pairs = [Encoded.of(*(rng.integers(3, 41, rng.integers(2, 15)) for _ in range(3))) for _ in range(PAIRS)]
    lengths = np.array([pair.lengths for pair in pairs])
    _, name = checks.fit(configs.Config(), config, lengths)
    shape = packing.Shape(pairs=PAIRS, rows=rows, row_length=64, microbatches=4 // rows, layout=name)
    return layout.collate(pairs, np.full((PAIRS, 2), -40.0), shape)


# Plain matrices; several stored as one: per head, and one after another; [in, out] and learned positions; experts.
NAMES = ["llama-all", "gpt_neox-all", "phi3-all", "gpt2-all", "mixtral-all"]


STARTS = [(name, dtype) for name in NAMES for dtype in (jnp.float32, jnp.bfloat16)]
STARTS = [STARTS[0], STARTS[3], *(pytest.param(*each, marks=pytest.mark.slow) for each in STARTS[1:3] + STARTS[4:])]


@pytest.mark.parametrize(("name", "dtype"), STARTS)
def test_adapters_at_their_start_change_no_bit(name, dtype, tmp_path):
    adapters = adapters_of(name)
    config, beside, frozen = loaded(name, tmp_path, adapters)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), batch_of(config).rows)
    plain = jax.jit(make_logps_fn(config, pairs=PAIRS, options=ModelOptions(dtype)))(frozen, rows)
    logps_fn = jax.jit(make_logps_fn(config, pairs=PAIRS, options=ModelOptions(dtype, adapters=adapters)))
    jax.tree.map(np.testing.assert_array_equal, logps_fn(trees.join(beside, frozen), rows), plain)
    other = trees.nest(moved(trees.flatten(beside)))
    assert np.abs(logps_fn(trees.join(other, frozen), rows)[0] - plain[0]).min() > 1e-2


def update(config, adapters, params, frozen, batch, mesh=None):
    """What one update subtracts, by gradient descent of rate 1."""
    tx = optax.sgd(1.0)
    logps_fn = make_logps_fn(config, pairs=PAIRS, options=ModelOptions(adapters=adapters), placement=Placement(mesh))
    state = steps.init_state(params, tx)
    if mesh is not None:
        state = jax.device_put(state, sharding.shardings(mesh, state))
        frozen = jax.device_put(frozen, sharding.shardings(mesh, frozen))
        batch = sharding.put(batch, mesh)

    def step(state, frozen, batch):
        def bound(params, rows, sums):
            return logps_fn(params, rows, sums, frozen=frozen)

        return steps.make_train_step(bound, losses.make_loss("sigmoid", {}), tx, has_aux=True, in_place=True)(
            state, batch
        )

    state, metrics = jax.jit(step)(state, frozen, batch)
    return jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state.params, params), metrics


def plain_gradients(config, adapters, params, frozen, batch):
    """Those of the merged model, differentiated through the merge."""
    logps_fn = make_logps_fn(config, pairs=PAIRS)
    loss_fn = losses.make_loss("sigmoid", {})
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        merged = merge(trees.join(params, frozen), adapters)
        rows = jax.tree.map(lambda x: x[0], batch.rows)
        return loss_fn(logps_fn(merged, rows)[0], batch.reference, lengths=batch.lengths).mean()

    return jax.grad(loss)(params)


def assert_near(one, other, tolerance=2e-5):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        limit = tolerance * np.abs(b).max() + 1e-7
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_merged_model(name, tmp_path):
    adapters = adapters_of(name, stabilized=True)
    config, params, frozen = loaded(name, tmp_path, adapters, at_start=False)
    found, metrics = update(config, adapters, params, frozen, batch_of(config, rows=1))
    expected = plain_gradients(config, adapters, params, frozen, batch_of(config, rows=4))
    assert_near(found, expected)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-all", "gpt_neox-all", "mixtral-all"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1), (1, 1, 4)], ids=str)
def test_no_mesh_changes_the_gradients(name, sizes, tmp_path):
    adapters = adapters_of(name)
    config, params, frozen = loaded(name, tmp_path, adapters, at_start=False)
    one, _ = update(config, adapters, params, frozen, batch_of(config))
    replica, fsdp, tensor = sizes
    mesh = sharding.make_mesh(replica, fsdp, tensor, jax.devices()[: math.prod(sizes)])
    assert_near(update(config, adapters, params, frozen, batch_of(config), mesh)[0], one)


def test_first_values_are_those_of_peft_and_depend_on_the_seed_alone():
    adapters = adapters_of("gpt_neox-all")
    config, _ = table_of("gpt_neox-all")
    one, again, other = (first_values(adapters, config.stacks, seed=seed) for seed in (0, 0, 1))
    assert sorted(one) == sorted(
        f"blocks/{at}"
        for at in ("attention/q/lora_a", "attention/q/lora_b", "attention/k/lora_b", "attention/v/lora_b")
        + tuple(f"{module}/lora_{side}" for module in ("attention/o", "mlp/up", "mlp/down") for side in "ab")
    ), "maps that are stored as one have one A"
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, again[path])
        assert leaf.dtype == np.float32
        if path.endswith("lora_b"):
            assert not leaf.any()
            continue
        assert (leaf != other[path]).all()
        inputs = math.prod(leaf.shape[1:-1])
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform of a = sqrt(5)
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert len(np.unique(leaf[:, ..., 0])) > len(leaf), "every layer has its own"


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilized", "scale"), [(4, 8.0, False, 2.0), (4, 8.0, True, 4.0), (16, 16.0, False, 1.0)]
)
def test_scale(rank, alpha, stabilized, scale):
    assert Adapters(rank, alpha, stabilized, ()).scale == scale


def names_of(chosen):
    return [module_of(each).rpartition("{layer}.")[2] for each in chosen]


def test_targets_choose_whole_names_in_every_layer():
    config, table = table_of("llama-all")
    every = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    every += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names_of(choose(table, config.stacks, "")) == every
    assert names_of(choose(table, config.stacks, r".*\.(q|o)_proj")) == every[0:4:3]
    assert names_of(choose(table, config.stacks, r"model\.layers\.\d+\.mlp\..*")) == every[4:]
    for targets, words in (
        (
            "q_proj",
            r"no module that can have adapters; .* as \.\*\\\.q_proj does",
        ),  # the whole name, as PEFT takes a pattern
        (r"lm_head|model\.embed_tokens", "no module that can have adapters"),
        (r".*layers\.[01]\..*q_proj", r"q_proj in some of the layers only"),
    ):
        with pytest.raises(InputError, match=words):
            choose(table, config.stacks, targets)


def test_experts_and_routers_get_none():
    config, table = table_of("mixtral-all")
    assert names_of(choose(table, config.stacks, "")) == [f"self_attn.{each}_proj" for each in "qkvo"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again(name, tmp_path):
    adapters = adapters_of(name, alpha=5.5, stabilized=True)
    config, table = table_of(name)
    leaves = moved(first_values(adapters, config.stacks, seed=0))
    peft.save(trees.nest(leaves), adapters, table, config.stacks, base="owner/name", out=tmp_path / "adapter")
    again = peft.read(tmp_path / "adapter", table, config.stacks)
    assert again[:3] == adapters[:3] and names_of(again.tensors) == names_of(adapters.tensors)
    found = peft.load(tmp_path / "adapter", again, config.stacks)
    assert found.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path], leaf)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for stem in {key.rpartition(".lora_")[0] for key in stored}:
        a, b = (stored[f"{stem}.lora_{side}.weight"] for side in "AB")
        assert stem.startswith("base_model.model.") and (a.shape[0], b.shape[1]) == (3, 3)
    described = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "owner/name"
    assert described["fan_in_fan_out"] == (name == "gpt2-all")


def test_target_modules_say_no_more_than_is_needed_to_tell_them_apart():
    config, table = table_of("gpt2-all")
    able = choose(table, config.stacks, "")
    assert peft.endings(able, able) == ["c_attn", "c_fc", "c_proj"]
    some = choose(table, config.stacks, r".*attn\.c_proj")
    assert peft.endings(some, able) == ["attn.c_proj"]


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type: got IA3.*merge_and_unload"),
    ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING.*cannot be merged.*LoRA instead"),
    ({"use_dora": True}, "use_dora=True.*merge_and_unload"),
    ({"bias": "all"}, "bias='all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"something_new": 1}, "something_new=1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"r": 5}, r"lora_A.weight is \[3, 32\], not \[5, 32\]"),
    ({"r": None}, "missing"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_adapters_that_compute_something_else_are_refused(changes, words, tmp_path):
    adapters = adapters_of("llama-all")
    config, table = table_of("llama-all")
    first = trees.nest(first_values(adapters, config.stacks, seed=0))
    peft.save(first, adapters, table, config.stacks, base="owner/name", out=tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=words):
        peft.read(tmp_path / "adapter", table, config.stacks)


def test_adapter_of_embeddings_or_with_whole_tensors_is_refused_with_the_way_out(tmp_path):
    """PEFT puts whole embeddings into the file by itself where tokens were added."""
    adapters = adapters_of("llama-all")
    config, table = table_of("llama-all")
    first = trees.nest(first_values(adapters, config.stacks, seed=0))
    peft.save(first, adapters, table, config.stacks, base="owner/name", out=tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.weight"):
        save_file(tensors | {f"base_model.model.{name}": np.zeros((3, 41), "f4")}, file)
        module = "model.embed_tokens" + ".weight" * name.endswith("weight")
        with pytest.raises(InputError, match=f"changes {module};.*merge_and_unload"):
            peft.read(tmp_path / "adapter", table, config.stacks)


def test_adapter_of_some_layers_or_of_another_model_is_refused(tmp_path):
    adapters = adapters_of("llama-all")
    config, table = table_of("llama-all")
    first = trees.nest(first_values(adapters, config.stacks, seed=0))
    peft.save(first, adapters, table, config.stacks, base="owner/name", out=tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "layers.1." not in key}, file)
    with pytest.raises(
        InputError, match="layers.N.self_attn.q_proj in 3 of 4 layers.*in all layers N.*merge_and_unload"
    ):
        peft.read(tmp_path / "adapter", table, config.stacks)
    save_file({key: value for key, value in tensors.items() if "layers.1.self_attn.q_proj.lora_A" not in key}, file)
    with pytest.raises(InputError, match=r"missing \S+.layers.1.self_attn.q_proj.lora_A.weight.*merge_and_unload"):
        peft.read(tmp_path / "adapter", table, config.stacks)
    save_file(tensors, file)
    other, others = table_of("gpt_neox-all")
    with pytest.raises(
        InputError, match="changes model.layers.0.mlp.down_proj, .* 23 more; .*query_key_value.*of another m"
    ):
        peft.read(tmp_path / "adapter", others, other.stacks)
    file.rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(InputError, match="no adapter_model.safetensors, but adapter_model.bin"):
        peft.read(tmp_path / "adapter", table, config.stacks)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("adapters") / "inputs")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "run"
    train.run(make_config(inputs, lora__rank=2), folder)
    return folder


def test_run_trains_adapters_alone_and_exports_them(finished, inputs):
    """The first loss is that of a policy equal to its reference, exactly; checkpoints hold adapters and no weights."""
    rows = read_rows(finished / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert read_rows(finished / "eval.jsonl")[0]["eval/rewards/margins"] == 0
    assert len({row["loss"] for row in rows}) > 2
    found = load_inputs(make_config(inputs, lora__rank=2), training=True)
    adapters = found.trainable.adapters
    assert adapters is not None and adapters.scale == 2
    exported = peft.load(finished / "export", adapters, found.model.stacks)
    count = sum(leaf.size for leaf in exported.values())
    whole = trees.flatten(checkpoints.load_params(inputs / "model", found.model))
    assert count < sum(leaf.size for leaf in whole.values()) / 20
    tree = jax.eval_shape(lambda: adam(found.trainable, exported))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree.opt_state) if leaf.ndim)
    assert held == 2 * 4 * count, "two float32 moments of each number of the adapters"
    newest = finished / f"checkpoints/{STEPS}/state"
    saved = json.loads((newest / "_METADATA").read_text())["tree_metadata"]
    paths = ["/".join(str(key["key"]) for key in each["key_metadata"]) for each in saved.values()]
    assert {path for path in paths if path.startswith("params/")} == {f"params/{path}" for path in exported}
    assert all("lora_" in path for path in paths if "/" in path and "blocks" in path)
    names = {path.name for path in (finished / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    card = (finished / "export/README.md").read_text()
    assert "library_name: peft" in card and "rank 2, scale 2, beside mlp.down_proj" in card


def adam(chosen, leaves):
    trained, frozen = chosen.split(trees.nest(leaves))
    assert not frozen
    return steps.init_state(trained, optax.adam(1e-3))


def test_run_with_adapters_goes_on_bit_for_bit(finished, inputs, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for each in (tmp_path / "run/checkpoints").iterdir():
        if each.name != "4":
            shutil.rmtree(each)
    shutil.rmtree(tmp_path / "run/export")
    train.run(make_config(inputs, lora__rank=2), tmp_path / "run")
    assert untimed(read_rows(tmp_path / "run/metrics.jsonl")) == untimed(read_rows(finished / "metrics.jsonl"))
    ours, theirs = (snapshot(run / "export") for run in (tmp_path / "run", finished))
    assert ours == theirs


@pytest.mark.slow
def test_merged_export_evaluates_as_the_adapters_do(finished, inputs, tmp_path):
    config = make_config(inputs, lora__rank=2)
    commands.export_checkpoint(config, finished, tmp_path / "merged", merge=True)
    card = (tmp_path / "merged/README.md").read_text()
    assert "library_name: transformers" in card and "adapters, merged" in card
    before = commands.evaluate_checkpoint(config, finished)
    assert before["eval/logps/chosen"] == pytest.approx(
        read_rows(finished / "eval.jsonl")[-1]["eval/logps/chosen"], rel=1e-7
    )
    merged = make_config(inputs, model__path=str(tmp_path / "merged"), train__steps=1, loss__name="sft")
    train.run(merged, tmp_path / "again")
    after = read_rows(tmp_path / "again/eval.jsonl")[0]
    assert after["eval/logps/chosen"] == pytest.approx(before["eval/logps/chosen"], rel=1e-6)
    with pytest.raises(InputError, match="a run without adapters"):
        commands.export_checkpoint(merged, tmp_path / "again", tmp_path / "no", merge=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_run_from_an_adapter_has_it_as_its_reference(finished, inputs, tmp_path):
    """Its values are no other model's, and what it exports is the same adapter, trained on."""
    config = make_config(inputs, lora__path=str(finished / "export"))
    train.run(config, tmp_path / "run")
    first = read_rows(tmp_path / "run/eval.jsonl")[0]
    last = read_rows(finished / "eval.jsonl")[-1]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["eval/logps/chosen"] == pytest.approx(last["eval/logps/chosen"], rel=1e-6)
    described = [json.loads((run / "export/adapter_config.json").read_text()) for run in (finished, tmp_path / "run")]
    assert described[0] == described[1]
    other = make_config(inputs, lora__rank=2, reference__path=str(tmp_path / "run/reference"))
    with pytest.raises(InputError, match="adapters"):
        commands.score_reference(other, tmp_path)


@pytest.mark.slow
def test_supervised_stage_trains_adapters_and_the_next_goes_on_from_them(inputs, tmp_path):
    config = make_config(inputs, lora__rank=2, sft__steps=4, sft__batch_pairs=8, sft__learning_rate=1e-2)
    train.run(config, tmp_path / "run")
    stage, rows = (read_rows(tmp_path / part / "eval.jsonl") for part in ("run/sft", "run"))
    assert stage[-1]["eval/loss"] < stage[0]["eval/loss"]
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (tmp_path / "run/sft/export/adapter_config.json").exists()
    row = commands.evaluate_checkpoint(config, tmp_path / "run")
    assert row["eval/loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-6)


def test_fields_that_do_not_go_together_are_refused(inputs, tmp_path):
    for fields, words in (
        (dict(lora__path="x", lora__rank=2), "lora.path"),
        (dict(lora__alpha=4.0), "lora.rank"),
        (dict(lora__rank=2, train__freeze="embed"), "train.freeze"),
        (dict(lora__rank=2, lora__targets="("), "regular expression"),
        (dict(lora__rank=-1), "lora.rank"),
    ):
        with pytest.raises(InputError, match=words):
            make_config(inputs, **fields)
    with pytest.raises(InputError, match="no module that can have adapters"):
        load_inputs(make_config(inputs, lora__rank=2, lora__targets="nothing"), training=True)
    with pytest.raises(InputError, match="adapter_config.json"):
        load_inputs(make_config(inputs, lora__path=str(inputs / "model")), training=True)
