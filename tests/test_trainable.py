"""Which parameters train: frozen tensors, frozen layers, and learning rates by layer."""

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dpo_jax import optim, steps, train, trees
from dpo_jax.hf import checkpoints
from dpo_jax.hf.families import FAMILIES
from dpo_jax.run import trainable
from dpo_jax.types import InputError
from tests.support.hf_folders import CONFIGS, NEOX, decoder_config, random_leaves
from tests.support.runs import load_inputs, make_config, make_inputs, read_rows

FREEZE = r"embed_tokens|layers\.0\.|layers\.\d\.mlp\.up_proj"


def select(hf, **options):
    config = decoder_config(hf)
    return trainable.select(FAMILIES[hf["model_type"]].tensors(config), config, **options)


def test_frozen_tensors_are_split_off_and_gradients_of_frozen_layers_are_masked():
    hf = CONFIGS["llama"]
    selected = select(hf, freeze=FREEZE)
    leaves = random_leaves(hf)
    trained, frozen = (trees.flatten(tree) for tree in selected.split(trees.nest(leaves)))
    assert frozen.keys() == {"embed/embedding", "blocks/mlp/up/kernel", "blocks/mlp/up/bias"}
    assert trained.keys() | frozen.keys() == leaves.keys()
    masked = trees.flatten(selected.mask_gradients(trees.nest(trained)))
    for path, leaf in trained.items():
        expected = leaf.copy()
        if path.startswith("blocks/"):
            expected[0] = 0
        np.testing.assert_array_equal(masked[path], expected, err_msg=path)


def test_every_leaf_of_a_tensor_that_holds_several_is_frozen():
    selected = select(NEOX, freeze=r"query_key_value\.weight")
    assert {path for path in selected.multipliers if not selected.trains(path)} == {
        f"blocks/attention/{x}/kernel" for x in "qkv"
    }


def test_layer_decay_goes_from_the_head_down_to_the_embeddings():
    selected = select(CONFIGS["llama"], layer_decay=0.5)
    for path in ("blocks/mlp/up/kernel", "blocks/attention_norm/scale"):
        assert selected.multipliers[path].ravel().tolist() == [0.125, 0.25, 0.5]
    assert selected.multipliers["embed/embedding"] == 0.0625
    assert not {"head/embedding", "final_norm/scale"} & selected.multipliers.keys()


@pytest.mark.parametrize(
    ("freeze", "message"), [("nothing such", "matches no tensor"), ("", None), (".", "matches every tensor")]
)
def test_patterns_that_leave_nothing_to_do_are_refused(freeze, message):
    if message is None:
        assert select(CONFIGS["llama"], freeze=freeze) == trainable.EVERYTHING
        return
    with pytest.raises(InputError, match=message):
        select(CONFIGS["llama"], freeze=freeze)


def test_rates_by_layer_have_parity_with_torch_parameter_groups():
    """Layers of their own in groups of their own, with AdamW, decay and clipping over what trains."""
    torch = pytest.importorskip("torch")
    hf = CONFIGS["llama"]
    selected = select(hf, freeze=FREEZE, layer_decay=0.7)
    trained, _ = selected.split(trees.nest(random_leaves(hf)))
    groups, tensors = [], {}
    for path, leaf in trees.flatten(trained).items():
        rates = np.broadcast_to(
            np.ravel(selected.multipliers.get(path, 1.0)), len(leaf) if path.startswith("blocks/") else 1
        )
        parts = leaf if path.startswith("blocks/") else [leaf]
        for at, (part, rate) in enumerate(zip(parts, rates, strict=True)):
            if rate:
                tensors[path, at] = torch.nn.Parameter(torch.tensor(part))
                decay = 0.0 if path.endswith(("scale", "bias")) else 0.3
                groups.append(dict(params=[tensors[path, at]], lr=1e-2 * float(rate), weight_decay=decay))
    optimizer = torch.optim.AdamW(groups)
    fields: dict[str, Any] = dict(
        weight_decay=0.3, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8, warmup_steps=0, total_steps=9
    )
    tx, _ = optim.make_optimizer(
        name="adamw", learning_rate=1e-2, schedule="constant", scale_updates=selected.scale_updates, **fields
    )
    state, rng = steps.init_state(trained, tx), np.random.default_rng(0)
    for _ in range(4):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trained)
        masked = selected.mask_gradients(grads)
        updates, opt_state = tx.update(masked, state.opt_state, state.params)
        state = steps.TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, {})
        by_path = trees.flatten(grads)
        for (path, at), tensor in tensors.items():
            grad = by_path[path][at] if path.startswith("blocks/") else by_path[path]
            tensor.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        np.testing.assert_allclose(optax.tree.norm(masked), norm, rtol=1e-5)
        optimizer.step()
    after, before = trees.flatten(state.params), trees.flatten(trained)
    for path, leaf in after.items():
        for at in range(len(leaf) if path.startswith("blocks/") else 1):
            part, was = (x[at] if path.startswith("blocks/") else x for x in (leaf, before[path]))
            if (path, at) in tensors:
                np.testing.assert_allclose(part, tensors[path, at].detach().numpy(), rtol=2e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(part, was)


@pytest.mark.slow
def test_run_leaves_frozen_tensors_as_they_were(tmp_path):
    """To the last bit, also where the parameters are bfloat16 and are rounded at random; the others learn."""
    inputs = make_inputs(tmp_path / "inputs")
    config = make_config(inputs, train__freeze=FREEZE, model__param_dtype="bfloat16", export__dtype="bfloat16")
    model = inputs / "model"
    found = load_inputs(config, training=True)
    checkpoints.export(
        checkpoints.load_params(model, found.model, dtype="bfloat16"),
        base=model,
        out=tmp_path / "base",
        options=checkpoints.WriteOptions(dtype="bfloat16"),
    )
    train.run(config, tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", tmp_path / "run/export"))
    assert before.keys() == after.keys()
    same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    assert same == {name for name in before if re.search(FREEZE, name)}
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert FREEZE.replace("|", r"\|") in (tmp_path / "run/export/README.md").read_text()
    assert rows[0]["grad_norm"] > 0 and len({row["loss"] for row in rows}) > 2
