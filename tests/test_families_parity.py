"""Both families against transformers: the same logits from the same files, and the same files back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax.models import decoder, hf_config, hf_io

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
activations = pytest.importorskip("transformers.activations")

LLAMA = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
NEOX = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
# Each variant moves fields away from their defaults, so that a field read wrongly or not at all shows in the logits.
LLAMA_VARIANTS = {
    "plain": {},
    "grouped": dict(num_key_value_heads=2, rms_norm_eps=1e-2, tie_word_embeddings=True),
    "theta": dict(rope_parameters={"rope_theta": 50.0, "rope_type": "default"}, head_dim=12, num_key_value_heads=1),
    "biases": dict(
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
        rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
    ),
}
NEOX_VARIANTS = {
    "plain": {},
    "sequential": dict(use_parallel_residual=False, layer_norm_eps=1e-2, attention_bias=False),
    "full_rotary": dict(rotary_pct=1.0, rotary_emb_base=50, hidden_act="relu"),
    "half_rotary": dict(rotary_pct=0.5, rotary_emb_base=50000, hidden_act="gelu_new", tie_word_embeddings=True),
}
VARIANTS = [("llama", name) for name in LLAMA_VARIANTS] + [("gpt_neox", name) for name in NEOX_VARIANTS]


# On logits of order 1 to 5. Float error stays under 5e-6; the two forms of gelu differ by 3e-4, other fields by more.
TOLERANCE = 2e-5
# Fields that leave all shapes alone, so that only the numbers can tell whether they were honoured.
SILENT = [
    ("llama", "grouped", "norm_eps"),
    ("llama", "theta", "rope_theta"),
    ("llama", "biases", "activation"),
    ("gpt_neox", "sequential", "norm_eps"),
    ("gpt_neox", "sequential", "parallel_residual"),
    ("gpt_neox", "full_rotary", "rotary_dim"),
    ("gpt_neox", "half_rotary", "rope_theta"),
    ("gpt_neox", "half_rotary", "activation"),
]


def build(model_type, name):
    """A transformers model with every parameter random, norms and biases too, and large enough to be nonlinear."""
    base, variants = {"llama": (LLAMA, LLAMA_VARIANTS), "gpt_neox": (NEOX, NEOX_VARIANTS)}[model_type]
    config = transformers.AutoConfig.for_model(model_type, **base | variants[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


@pytest.fixture(params=VARIANTS, ids="-".join, scope="module")
def saved(request, tmp_path_factory):
    """A variant's model, and the folder transformers saved it in."""
    model, folder = build(*request.param), tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return model, folder


def load(folder):
    config, _ = hf_io.read_config(folder)
    return hf_io.load_params(
        folder, config, place=lambda path, shape, read: jnp.asarray(hf_io.whole(path, shape, read))
    ), config


def tokens_of(model):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(tokens_of(model)).long()).logits.numpy()


def our_logits(params, config, tokens):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden = decoder.forward(params, config, jnp.asarray(tokens), at, jnp.zeros_like(at), at + 1)
        return np.asarray(hidden @ decoder.head(params).T)


def test_logits_equal_those_of_transformers(saved):
    model, folder = saved
    params, config = load(folder)
    theirs, ours = their_logits(model), our_logits(params, config, tokens_of(model))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", hf_config.ACTIVATIONS)
def test_activation_equals_that_of_transformers(name):
    """The two forms of gelu lie 4.7e-4 apart."""
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    theirs = activations.ACT2FN[name](torch.from_numpy(x)).numpy()
    ours = np.asarray(decoder.ACTIVATIONS[hf_config.ACTIVATIONS[name]](jnp.asarray(x)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model_type, name, field", SILENT)
def test_variant_differs_from_the_plain_model_by_more_than_the_tolerance(tmp_path, model_type, name, field):
    """The test above sees only what makes a difference: here each field is put back, as if it had been ignored."""
    model = build(model_type, name)
    model.save_pretrained(tmp_path)
    params, config = load(tmp_path)
    build(model_type, "plain").config.save_pretrained(tmp_path)
    usual = getattr(hf_io.read_config(tmp_path)[0], field)
    assert usual != getattr(config, field)
    ignored = our_logits(params, dataclasses.replace(config, **{field: usual}), tokens_of(model))
    assert np.abs(ignored - their_logits(model)).max() > 10 * TOLERANCE


def test_export_of_an_untouched_import_is_bit_exact(saved, tmp_path):
    """Tensor for tensor what transformers wrote, with the same configuration; and transformers reads it back whole."""
    model, folder = saved
    params, _ = load(folder)
    out = tmp_path / "out"
    hf_io.export(params, base=folder, out=out)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    again, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    np.testing.assert_array_equal(their_logits(again.eval()), their_logits(model))
