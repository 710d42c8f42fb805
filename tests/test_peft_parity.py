"""Adapters against PEFT's: folders written by either are read by the other, and compute the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.hf import checkpoints
from dpo_jax.hf import peft as peft_module
from dpo_jax.hf.adapters import Adapters, choose, first_values, merge, module_of, with_shared_factors
from dpo_jax.models import decoder
from dpo_jax.trees import join
from tests.support.make_golden import JSON, TOKENS, write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LIMIT = 1e-5  # of the largest logit, about 4: these models turn float32's rounding into as much by themselves
GOLDEN = json.loads(JSON.read_text())["cases"]
# Plain matrices; three of them stored as one, per head, or one after another, or [in, out]; two; and experts beside.
CASES = ["llama-all", "gpt_neox-all", "phi3-all", "gpt2-all", "gemma3_text-all", "mixtral-all"]
SOME = {  # of the modules, some
    "llama-all": r".*\.(q_proj|down_proj)",
    "gpt_neox-all": r".*\.(query_key_value|dense)",
    "phi3-all": r".*\.(qkv_proj|gate_up_proj)",
    "gpt2-all": r".*\.attn\.c_proj|.*\.c_attn",
    "gemma3_text-all": r".*\.o_proj",
    "mixtral-all": r".*\.self_attn\..*",
}


def read(folder):
    config, _ = checkpoints.read_config(folder)
    table, _ = checkpoints.family_table(folder, config)
    return config, table, checkpoints.load_params(folder, config)


def logits(params, config, adapters=None):
    at = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    tokens = jnp.asarray(TOKENS)
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    given = params if adapters is None else with_shared_factors(params, adapters)
    scale = 1.0 if adapters is None else adapters.scale
    hidden, _ = decoder.hidden_states(
        given, config, x, at, jnp.zeros_like(at), at + 1, decoder.BlockOptions(adapter_scale=scale)
    )
    return np.asarray(decoder.logits(params, config, hidden))


def theirs_of(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def moved(leaves, seed=0):
    """Adapters as after some training: B no longer 0."""
    rng = np.random.default_rng(seed)
    return {path: (rng.normal(size=leaf.shape) * 0.1).astype(np.float32) for path, leaf in leaves.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stabilized", [False, True], ids=["", "rslora"])
def test_adapter_written_here_has_parity_in_peft(name, stabilized, tmp_path):
    write_folder(tmp_path / "base", GOLDEN[name])
    config, table, params = read(tmp_path / "base")
    chosen = choose(table, config.stacks, SOME[name] if stabilized else "")
    adapters = Adapters(3, 7.0, stabilized, chosen)
    params = join(params, trees.nest(moved(first_values(adapters, config.stacks, seed=0))))
    peft_module.save(params, adapters, table, config.stacks, base=str(tmp_path / "base"), out=tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    names = {key for key in model.state_dict() if ".lora_" in key}
    assert len(names) == 2 * config.layers * len(chosen), "PEFT finds adapters of the same modules and no others"
    ours = logits(params, config, adapters)
    theirs = theirs_of(model)
    print(f"{name}: largest logit {np.abs(ours).max():.1f}, PEFT {np.abs(ours - theirs).max():.1e} apart")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT * np.abs(ours).max())
    with model.disable_adapter():
        assert np.abs(ours - theirs_of(model)).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_adapter_written_by_peft_has_parity_here_and_merged(name, tmp_path):
    write_folder(tmp_path / "base", GOLDEN[name])
    config, table, params = read(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    able = choose(table, config.stacks, "")
    targets = sorted({module_of(each).split(".")[-1] for each in able})
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".lora_" in key:
                value.normal_(std=0.1, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    adapters = peft_module.read(tmp_path / "adapter", table, config.stacks)
    assert adapters.scale == pytest.approx(5 / 3) and len(adapters.tensors) == len(able)
    both = join(params, trees.nest(peft_module.load(tmp_path / "adapter", adapters, config.stacks)))
    ours, theirs = logits(both, config, adapters), theirs_of(model)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT * np.abs(ours).max())
    merged = merge(both, adapters)
    assert trees.flatten(merged).keys() == trees.flatten(params).keys()
    np.testing.assert_allclose(logits(merged, config), ours, rtol=0, atol=LIMIT * np.abs(ours).max())
    print(
        f"{name}: largest logit {np.abs(ours).max():.1f}, PEFT {np.abs(ours - theirs).max():.1e} apart, "
        f"merged {np.abs(logits(merged, config) - ours).max():.1e}"
    )
    checkpoints.export(merged, base=tmp_path / "base", out=tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(theirs_of(again), theirs, rtol=0, atol=LIMIT * np.abs(ours).max())
