"""Reading `config.json`: every field counts, is known to be harmless, or is refused."""

import pytest

from dpo_jax.models import hf_config, hf_io
from dpo_jax.types import InputError
from tests.hf_folders import CONFIG, LLAMA, NEOX, decoder_config, edit_config, save


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    save(tmp_path / "m")
    edit_config(tmp_path / "m", model_type="mamba")
    with pytest.raises(InputError, match="'mamba'.*gpt_neox, llama"):
        hf_io.read_config(tmp_path / "m")


@pytest.mark.parametrize(
    "hf, changes, message",
    [
        (LLAMA, dict(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (LLAMA, dict(quantization_config={"bits": 4}), "quantised"),
        (LLAMA, dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.*linear"),
        (LLAMA, dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling.*llama3"),
        (LLAMA, dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters.*yarn"),
        (LLAMA, dict(rope_parameters={"rope_type": "default", "factor": 2.0}), "factor=2.0"),
        (LLAMA, dict(rope_theta=1e4, rope_parameters={"rope_theta": 2e4}), "rope_theta=10000.0.*rope_theta=20000.0"),
        (LLAMA, dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (LLAMA, dict(rope_interleaved=True), "rope_interleaved=True"),
        (LLAMA, dict(pretraining_tp=2), "pretraining_tp=2"),
        (LLAMA, dict(attention_dropout=0.1), "attention_dropout=0.1.*attention_dropout=0"),
        (LLAMA, dict(hidden_act="gelu_10"), "hidden_act.*gelu_10"),
        (LLAMA, dict(num_key_value_heads=3), "num_attention_heads.*3 does not divide"),
        (LLAMA, dict(head_dim=None, num_attention_heads=3), "hidden_size.*3 does not divide"),
        (LLAMA, dict(head_dim=5), "head_dim.*even number"),
        (LLAMA, dict(hidden_size=None), "hidden_size: missing"),
        (LLAMA, dict(hidden_size=True), "hidden_size: got True"),
        (LLAMA, dict(hidden_size=-16), "hidden_size: got -16"),
        (LLAMA, dict(rope_theta="big"), "rope_theta: got 'big'"),
        (LLAMA, dict(sliding_window=32, logit_scale=2.0), "logit_scale=2.0, sliding_window=32"),
        (LLAMA, dict(auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (NEOX, dict(hidden_dropout=0.1, attention_dropout=0.2), "attention_dropout=0.2, hidden_dropout=0.1"),
        (NEOX, dict(rope_theta=1e4, rotary_emb_base=2e4), "rotary_emb_base=20000.0, rope_theta=10000.0"),
        (NEOX, dict(rotary_pct=0.25), "even number"),
        (NEOX, dict(rotary_pct=1.5), "even number"),
        (NEOX, dict(hidden_size=18), "hidden_size.*4 does not divide"),
        (NEOX, dict(pretraining_tp=1), "pretraining_tp=1"),
    ],
)
def test_what_is_not_implemented_is_refused(hf, changes, message):
    with pytest.raises(InputError, match=message):
        decoder_config(hf | changes)


@pytest.mark.parametrize("hf", [LLAMA, NEOX], ids=["llama", "gpt_neox"])
def test_fields_that_change_nothing_are_accepted(hf):
    """What transformers writes for every model, private fields, and unknown ones that are null."""
    extra = dict.fromkeys(hf_config.HARMLESS - {"architectures", "model_type"}, 1)
    neutral = {name: values[0] for name, values in hf_config.NEUTRAL.items() if values}
    changes = extra | neutral | dict(_name_or_path="x", sliding_window=None, rope_scaling=None)
    assert decoder_config(hf | changes) == decoder_config(hf)


def test_llama_fields_are_read():
    config = decoder_config(
        LLAMA
        | dict(
            hidden_act="gelu_new",
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
            rope_theta=5e5,
            attention_bias=False,
        )
    )
    assert (config.vocab_size, config.width, config.layers, config.heads, config.kv_heads) == (40, 16, 3, 4, 2)
    assert (config.head_dim, config.rotary_dim, config.mlp_width, config.max_positions) == (6, 6, 24, 64)
    assert (config.norm, config.norm_eps, config.activation, config.gated) == ("rmsnorm", 1e-3, "gelu_tanh", True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, True)
    assert (config.tie_embeddings, config.rope_theta, config.parallel_residual) == (True, 5e5, False)


def test_gpt_neox_fields_are_read():
    config = decoder_config(
        NEOX | dict(layer_norm_eps=1e-3, use_parallel_residual=False, attention_bias=False, rotary_emb_base=5e5)
    )
    assert (config.heads, config.kv_heads, config.head_dim, config.rotary_dim) == (4, 4, 4, 2)
    assert (config.norm, config.norm_eps, config.activation, config.gated) == ("layernorm", 1e-3, "gelu", False)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, True)
    assert (config.parallel_residual, config.rope_theta, config.tie_embeddings) == (False, 5e5, False)


def test_absent_fields_have_the_defaults_of_transformers():
    small = {name: value for name, value in LLAMA.items() if name.startswith(("model", "vocab", "hidden", "inter"))}
    llama = decoder_config(small | dict(num_hidden_layers=3, num_attention_heads=4))
    assert (llama.kv_heads, llama.head_dim, llama.norm_eps, llama.activation) == (4, 4, 1e-6, "silu")
    assert (llama.rope_theta, llama.max_positions) == (1e4, 2048)
    assert not (llama.qkv_bias or llama.mlp_bias or llama.tie_embeddings)
    neox = decoder_config(small | dict(model_type="gpt_neox", num_hidden_layers=3, num_attention_heads=1))
    assert (neox.rotary_dim, neox.norm_eps, neox.activation, neox.rope_theta) == (4, 1e-5, "gelu", 1e4)
    assert neox.qkv_bias and neox.output_bias and neox.parallel_residual and not neox.tie_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=5e5),
        dict(rope_theta=5e5, rope_scaling={"type": "default"}),
        dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        dict(rope_scaling={"rope_theta": 5e5}),
        dict(rope_theta=500000, rope_parameters={"rope_theta": 5e5}, partial_rotary_factor=1),
    ],
)
def test_rope_theta_is_read_wherever_it_stands(changes):
    assert decoder_config(LLAMA | changes).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes",
    [
        dict(rotary_pct=0.5, rotary_emb_base=5e5),
        dict(rotary_pct=0.5, rotary_emb_base=500000, rope_theta=500000, partial_rotary_factor=0.5, rope_scaling=None),
        dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_partial_rotary_is_read_wherever_it_stands(changes):
    config = decoder_config({name: value for name, value in NEOX.items() if name != "rotary_pct"} | changes)
    assert (config.rotary_dim, config.rope_theta) == (2, 5e5)


def test_config_that_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json: no such file"):
        hf_io.read_config(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match="config.json: not JSON"):
        hf_io.read_config(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="config.json: a JSON list"):
        hf_io.read_config(tmp_path)
