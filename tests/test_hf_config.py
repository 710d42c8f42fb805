"""Reading `config.json`: every field counts, changes nothing, or is refused."""

import copy
import json
import re
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_jax.hf import checkpoints, config_json, transformers_source
from dpo_jax.hf.families import FAMILIES, gpt2, llama
from dpo_jax.types import InputError
from tests.support import published_configs
from tests.support.hf_folders import CONFIG, LLAMA, NEOX, decoder_config, edit_config, save
from tests.support.make_golden import JSON

GOLDEN = json.loads(JSON.read_text())["cases"]
PHI3, GEMMA3, QWEN2, SMOLLM3, QWEN3_MOE, GPTJ, GPT2 = (
    GOLDEN[f"{name}-plain"]["config"]
    for name in ("phi3", "gemma3_text", "qwen2", "smollm3", "qwen3_moe", "gptj", "gpt2")
)

LONG = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # LongRoPE under its first name


def turning(config):
    """Dimensions of each head that turn, and the base they turn by."""
    (rope,) = ropes(config)
    return rope.dim, pytest.approx(rope.frequencies[1] ** (-rope.dim / 2))


def ropes(config) -> list[Any]:
    """Of each kind of layer, how it turns."""
    return [kind.rope for kind in config.kinds]


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    """And what in its configuration is not understood."""
    save(tmp_path / "m")
    edit_config(tmp_path / "m", model_type="llambda")
    with pytest.raises(InputError, match="'llambda'; its config.json reads like Llama's.*gpt_neox, gptj, llama"):
        checkpoints.read_config(tmp_path / "m")
    edit_config(tmp_path / "m", model_type="granite", residual_multiplier=0.2, attention_multiplier=0.1)
    with pytest.raises(InputError, match="'granite'.*attention_multiplier=0.1 .*residual_multiplier=0.2 .read by"):
        checkpoints.read_config(tmp_path / "m")


@pytest.mark.parametrize(
    "hf, changes, message",
    [
        (LLAMA, dict(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (LLAMA, dict(quantization_config={"bits": 4}), "quantized"),
        (LLAMA, dict(rope_scaling={"type": "linear"}), "linear without factor"),
        (
            LLAMA,
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "llama3 without low_freq_factor, high_freq_f",
        ),
        (LLAMA, dict(rope_scaling={"rope_type": "proportional", "factor": 8.0}), "rope_type: got 'proportional'"),
        (
            LLAMA,
            dict(rope_scaling={"type": "yarn", "factor": 8.0, "low_freq_factor": 1.0}),
            "low_freq_factor=1.0.*for type yarn",
        ),
        (LLAMA, dict(rope_scaling={"type": "yarn", "factor": "8"}), "factor: got '8'"),
        (LLAMA, dict(rope_scaling={"type": "yarn", "factor": 8.0, "truncate": 1}), "truncate: got 1"),
        (LLAMA, dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), "type='linear'"),
        (LLAMA, dict(rope_scaling=[1.0]), r"rope_scaling: got \[1.0\]; expected an object"),
        (PHI3, dict(rope_parameters=LONG | {"long_factor": [1.0]}), "long_factor: 1 numbers; expected 4"),
        (PHI3, dict(rope_parameters=LONG | {"short_factor": [1.0, 0.0, 1.0, 1.0]}), "short_factor: got .1.0, 0.0"),
        (PHI3, dict(embd_pdrop=0.1), "embd_pdrop=0.1"),
        (GEMMA3, dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
        (GEMMA3, dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (GEMMA3, dict(layer_types=["full_attention"] * 3), "layer_types.*expected 4 of"),
        (GEMMA3, dict(layer_types=["chunked_attention"] * 4), "layer_types.*chunked"),
        (GEMMA3, dict(sliding_window=None), "sliding_attention without a sliding_window"),
        (GEMMA3, dict(rope_parameters={"rope_type": "default"}), "rope_parameters.*sliding_attention and full"),
        (QWEN2, dict(layer_types=["sliding_attention"] * 4), "sliding_attention without a sliding_window"),
        (SMOLLM3, dict(no_rope_layers=[1, 0]), "no_rope_layers.*expected 0 or 1 for each of 4"),
        (QWEN3_MOE, dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
        (QWEN3_MOE, dict(mlp_only_layers=[0]), "mlp_only_layers=.0."),
        (QWEN3_MOE, dict(num_experts_per_tok=9), "num_experts_per_tok: got 9 of 5"),
        (GPTJ, dict(rotary_dim=10), "rotary_dim: got 10; expected an even number up to 8"),
        (GPT2, dict(add_cross_attention=True), "add_cross_attention=True"),
        (LLAMA, dict(rope_parameters={"rope_type": "default", "factor": 2.0}), "factor=2.0"),
        (LLAMA, dict(rope_theta=1e4, rope_parameters={"rope_theta": 2e4}), "rope_theta=10000.0.*rope_theta=20000.0"),
        (LLAMA, dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (LLAMA, dict(rope_interleaved=True), "rope_interleaved=True"),
        (LLAMA, dict(attention_dropout=0.1), "attention_dropout=0.1.*attention_dropout=0"),
        (LLAMA, dict(hidden_act="gelu_10"), "hidden_act.*gelu_10"),
        (LLAMA, dict(num_key_value_heads=3), "num_attention_heads.*3 does not divide"),
        (LLAMA, dict(head_dim=None, num_attention_heads=3), "hidden_size.*3 does not divide"),
        (LLAMA, dict(head_dim=5), "even number"),
        (LLAMA, dict(hidden_size=None), "hidden_size: missing"),
        (LLAMA, dict(hidden_size=True), "hidden_size: got true; expected a positive whole number"),
        (LLAMA, dict(hidden_size=-16), "hidden_size: got -16"),
        (LLAMA, dict(rope_theta="big"), "rope_theta: got 'big'"),
        (
            LLAMA,
            dict(sliding_window=32, logit_scale=2.0),
            r"json: got sliding_window=32 .read by \S+ \S+ in .*no sliding_window\.",
        ),
        (GPT2, dict(hidden_size=48), "got hidden_size=48, n_embd=32"),
        (
            NEOX,
            dict(hidden_dropout=0.1, attention_dropout=0.2),
            "attention_dropout=0.2 .*hidden_dropout=0.1 .*attention_dropout=0, ",
        ),
        (NEOX, dict(rope_theta=1e4, rotary_emb_base=2e4), "rotary_emb_base=20000.0, rope_theta=10000.0"),
        (NEOX, dict(rotary_pct=0.25), "even number"),
        (NEOX, dict(rotary_pct=1.5), "even number"),
        (NEOX, dict(hidden_size=18), "hidden_size.*4 does not divide"),
    ],
)
def test_what_is_not_implemented_is_refused(hf, changes, message):
    with pytest.raises(InputError, match=message):
        decoder_config(hf | changes)


@pytest.mark.parametrize("hf", [LLAMA, NEOX], ids=["llama", "gpt_neox"])
def test_fields_that_change_nothing_are_accepted(hf):
    """What transformers writes for every model, private fields, and unknown ones that are null."""
    extra = dict.fromkeys(config_json.HARMLESS - {"architectures", "model_type"}, 1)
    neutral = {name: values[0] for name, values in config_json.NEUTRAL.items() if values}
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
    assert (config.head_dim, turning(config), config.mlp_width, config.max_positions) == (6, (6, 5e5), 24, 64)
    assert (config.norm, config.norm_eps, config.activation, config.gated) == ("rmsnorm", 1e-3, "gelu_tanh", True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, True)
    assert (config.tie_embeddings, config.parallel_residual) == (True, False)


def test_gpt_neox_fields_are_read():
    config = decoder_config(
        NEOX | dict(layer_norm_eps=1e-3, use_parallel_residual=False, attention_bias=False, rotary_emb_base=5e5)
    )
    assert (config.heads, config.kv_heads, config.head_dim, ropes(config)[0].dim) == (4, 4, 4, 2)
    assert (config.norm, config.norm_eps, config.activation, config.gated) == ("layernorm", 1e-3, "gelu", False)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, True)
    assert (config.parallel_residual, config.tie_embeddings) == (False, False)


def test_absent_fields_have_the_defaults_of_transformers():
    small = {name: value for name, value in LLAMA.items() if name.startswith(("model", "vocab", "hidden", "inter"))}
    llama = decoder_config(small | dict(num_hidden_layers=3, num_attention_heads=4))
    assert (llama.kv_heads, llama.head_dim, llama.norm_eps, llama.activation) == (4, 4, 1e-6, "silu")
    assert (*turning(llama), llama.max_positions) == (4, 1e4, 2048)
    assert not (llama.qkv_bias or llama.mlp_bias or llama.tie_embeddings)
    neox = decoder_config(small | dict(model_type="gpt_neox", num_hidden_layers=3, num_attention_heads=1))
    assert (*turning(neox), neox.norm_eps, neox.activation) == (4, 1e4, 1e-5, "gelu")
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
    assert turning(decoder_config(LLAMA | changes)) == (6, 5e5)


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
    assert config.kinds == decoder_config(NEOX | dict(rotary_emb_base=5e5)).kinds and ropes(config)[0].dim == 2


def test_config_that_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json: no such file"):
        checkpoints.read_config(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match="config.json: not JSON"):
        checkpoints.read_config(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="config.json: a JSON list"):
        checkpoints.read_config(tmp_path)


def test_window_that_is_null_is_none_and_one_that_is_absent_is_the_default_of_transformers():
    mistral = GOLDEN["mistral-plain"]["config"]
    assert decoder_config(mistral | dict(sliding_window=None)).windows == [None] * 4
    assert decoder_config({k: v for k, v in mistral.items() if k != "sliding_window"}).windows == [4096] * 4
    assert decoder_config(mistral | dict(sliding_window=7)).windows == [7] * 4


def test_layers_alternate_by_layer_types_or_by_the_older_pattern():
    assert decoder_config(GEMMA3 | dict(sliding_window=7)).windows == [7] * 4
    older = {k: v for k, v in GEMMA3.items() if k not in ("layer_types", "rope_parameters")}
    config = decoder_config(older | dict(sliding_window=7, sliding_window_pattern=2, rope_theta=1e5))
    assert config.windows == [7, None, 7, None] and config.pattern == (0, 1, 0, 1)
    near, far = (rope.frequencies[1] for rope in ropes(config))
    assert (near, far) == pytest.approx((1e4 ** (-2 / 12), 1e5 ** (-2 / 12)))


def test_what_no_sequence_reaches_is_left_out():
    """A window as long as the longest sequence hides nothing, and a trained length as long changes no turn."""
    config = decoder_config(GOLDEN["gemma3_text-all"]["config"])
    assert config.for_length(6) == config and config.needs_whole_sequences
    assert config.for_length(5).windows == [None] * 4 and len(config.for_length(5).kinds) == 2
    dynamic = decoder_config(GOLDEN["llama-dynamic"]["config"])
    assert dynamic.for_length(17) == dynamic and dynamic.needs_whole_sequences
    (rope,) = ropes(dynamic.for_length(16))
    assert rope.trained_length is None and rope.frequencies == ropes(dynamic)[0].frequencies


# What the installed transformers reads.


def test_field_that_transformers_does_not_read_changes_nothing():
    extra = dict(use_mrope=True, auto_map={"AutoModel": "x.Y"}, full_attn_mod=2, mlp_bias=True)
    assert decoder_config(QWEN2 | extra) == decoder_config(QWEN2)
    yarn = dict(type="yarn", factor=2.0)
    unread = decoder_config(LLAMA | dict(rope_scaling=yarn | dict(finetuned=True)))
    assert unread == decoder_config(LLAMA | dict(rope_scaling=yarn))


def test_field_of_a_type_that_transformers_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"gate=1 \(transformers \S+ has no such model_type"):
        llama.decoder_config(LLAMA | dict(model_type="llambda", gate=1), "config.json")


def test_source_tells_fields_and_their_defaults():
    own = """
class X(Base):
    gate: bool = False
    width: int = compute()
    attribute_map = {"alias": "gate"}
    local_name = self.state.pop("popped")  # comment
"""
    source = transformers_source.Source({"configuration_x.py": own}, {"modeling_utils.py": "getattr(config, 'shared')"})
    names = "gate width alias state popped shared local_name comment Base at ate".split()
    read = "configuration_x.py"
    assert [source.reader(name) for name in names] == [read] * 5 + ["modeling_utils.py"] + [None] * 5
    assert source.is_default("gate", False) and not source.is_default("gate", True)
    assert not source.is_default("width", 0) and not source.is_default("alias", False)


def test_every_family_has_its_source_and_no_field_by_a_computed_name():
    """Such a field would not be found. Computed are names of parts of a model, of arguments, and head_dim."""
    for kind in FAMILIES:
        source = transformers_source.source(kind)
        assert sorted(name.split("_")[0] for name in source.own) == ["configuration", "modeling"]
        computed = re.findall(
            r"""getattr\((?:self\.)?config, ([^"'].*?)[,)]""", "".join((source.own | source.shared).values())
        )
        assert set(computed) <= {"head_dim_key", "key", "sub_config_key", "subconfig_key"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_names_of_fields_are_those_of_transformers(kind):
    aliases = CONFIG_MAPPING[kind].attribute_map
    if kind in ("gpt2", "gptj"):
        assert aliases == gpt2.ALIASES
    else:
        assert {*aliases, *aliases.values()} <= {"num_experts", "num_local_experts"}  # both read by `take_experts`


def test_fields_under_their_other_names_are_read():
    for hf in (GPT2, GPTJ):
        other = {name: hf[own] for name, own in gpt2.ALIASES.items()}
        plain = {name: value for name, value in hf.items() if name not in gpt2.ALIASES.values()}
        assert decoder_config(plain | other) == decoder_config(hf | other) == decoder_config(hf)


# Files as published.


@pytest.mark.parametrize("name", published_configs.READ)
def test_published_file_is_read_and_means_what_transformers_writes_back(name):
    hf = published_configs.READ[name]
    config = decoder_config(hf)
    if "first commit" not in name or "Phi-3" not in name:  # transformers misses a field that this file has elsewhere
        again = CONFIG_MAPPING[hf["model_type"]].from_dict(copy.deepcopy(hf)).to_dict()
        assert decoder_config(again | dict(architectures=None)) == config


@pytest.mark.parametrize("name", published_configs.REFUSED)
def test_published_file_is_refused_for_the_one_field_that_changes_the_mathematics(name, tmp_path):
    hf, field = published_configs.REFUSED[name]
    (tmp_path / CONFIG).write_text(json.dumps(hf))
    with pytest.raises(InputError) as error:
        checkpoints.read_config(tmp_path)
    place, got = error.value.place.removeprefix(str(tmp_path / CONFIG)), error.value.got
    assert place == f": {field}" or (not place and re.match(rf"got {field}=[^,]*$", got))


def test_published_files_are_of_every_family():
    kinds = [hf["model_type"] for hf in published_configs.READ.values()]
    assert len(kinds) >= 60 and set(kinds) == FAMILIES.keys()
