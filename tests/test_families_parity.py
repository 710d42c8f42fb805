"""Every family against transformers itself: the golden files are what it computes now, every field of a configuration
counts, and what is written it reads back whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.hf import checkpoints, config_json
from dpo_jax.hf.families import FAMILIES
from dpo_jax.models import decoder
from dpo_jax.models.config import DecoderConfig
from tests.support import make_golden
from tests.support.family_cases import CASES
from tests.support.hf_folders import decoder_config
from tests.support.make_golden import TOKENS, write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
activations = pytest.importorskip("transformers.activations")

GOLDEN = json.loads(make_golden.JSON.read_text())["cases"]
TOLERANCE = 1e-4


def our_logits(params, config):
    at = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    hidden = decoder.forward(params, config, jnp.asarray(TOKENS), at, jnp.zeros_like(at), at + 1)
    return np.asarray(decoder.logits(params, config, hidden))


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_what_transformers_saves_and_computes(name):
    case, logits = make_golden.make(name)
    assert case == GOLDEN[name] | {
        "config": GOLDEN[name]["config"] | {"transformers_version": transformers.__version__}
    }
    golden = np.load(make_golden.LOGITS)[name]
    # Another processor rounds otherwise, and Gemma amplifies that.
    np.testing.assert_allclose(logits, golden, rtol=0, atol=1e-5 * np.abs(golden).max())


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_an_export_whole(name, tmp_path):
    write_folder(tmp_path / "base", GOLDEN[name])
    config, _ = checkpoints.read_config(tmp_path / "base")
    changed = jax.tree.map(lambda x: 0.5 * x, checkpoints.load_params(tmp_path / "base", config))
    checkpoints.export(changed, base=tmp_path / "base", out=tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(changed, config), theirs, rtol=0, atol=TOLERANCE)


# Fields that decide which leaves there are, and of which shape: read wrongly, nothing would load.
SHAPING = "qkv_bias output_bias mlp_bias tie_embeddings head_dim kv_heads heads mlp_width experts width pattern".split()
UNREAD = ["max_positions"]  # by the forward pass, where nothing is learned for each


def silent_fields():
    """Fields that a case moves from where they are in its family's plain one, and of which only numbers tell."""
    for name, case in GOLDEN.items():
        usual, config = plain(name), decoder_config(case["config"])
        for field in dataclasses.fields(DecoderConfig):
            if field.name not in SHAPING + UNREAD and getattr(usual, field.name) != getattr(config, field.name):
                yield name, field.name


def plain(name):
    return decoder_config(GOLDEN[f"{name.partition('-')[0]}-plain"]["config"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "field"), silent_fields())
def test_ignoring_a_field_would_show(name, field, tmp_path):
    """The tests above see only what makes a difference: here each field is put back, as if it had not been read."""
    write_folder(tmp_path, GOLDEN[name])
    config, _ = checkpoints.read_config(tmp_path)
    params = checkpoints.load_params(tmp_path, config)
    changes = {each: getattr(plain(name), each) for each in ((field, "pattern") if field == "kinds" else (field,))}
    ignored = our_logits(params, dataclasses.replace(config, **changes))
    assert np.abs(ignored - np.load(make_golden.LOGITS)[name]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(name, tmp_path):
    """Files of before a field existed mean what the field's default says."""
    transformers.AutoConfig.for_model(name).save_pretrained(tmp_path)
    full = json.loads((tmp_path / "config.json").read_text())
    needed = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    assert decoder_config({field: full[field] for field in needed if field in full}) == decoder_config(full)


@pytest.mark.parametrize("name", config_json.ACTIVATIONS)
def test_activation_equals_that_of_transformers(name):
    """The two forms of gelu lie 4.7e-4 apart."""
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    theirs = activations.ACT2FN[name](torch.from_numpy(x)).numpy()
    ours = np.asarray(decoder.ACTIVATIONS[config_json.ACTIVATIONS[name]](jnp.asarray(x)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
