"""Every family without torch: the logits that transformers had, the same files back, and the same log-probs however
pairs are laid out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import layout, packing
from dpo_jax.hf import checkpoints
from dpo_jax.hf.families import FAMILIES
from dpo_jax.models import decoder
from dpo_jax.run import checks
from dpo_jax.scoring import make_logps_fn
from dpo_jax.types import Encoded
from tests.support.family_cases import CASES
from tests.support.make_golden import JSON, LOGITS, TOKENS, write_folder

GOLDEN = json.loads(JSON.read_text())
TOLERANCE = 1e-4  # of logits up to 15; most lie within 1e-5


def load(folder):
    config, _ = checkpoints.read_config(folder)
    return jax.tree.map(jnp.asarray, checkpoints.load_params(folder, config)), config


def test_golden_files_are_of_every_case_and_cases_of_every_family():
    assert GOLDEN["cases"].keys() == CASES.keys()
    assert {kind for kind, _ in CASES.values()} == FAMILIES.keys()
    assert {f"{kind}-{each}" for kind in FAMILIES for each in ("plain", "all")} <= CASES.keys()


# Plain ones have nothing that those with all options moved have not.
LOGIT_CASES = [
    pytest.param(name, marks=pytest.mark.slow) if name.endswith("-plain") and name != "llama-plain" else name
    for name in CASES
]


@pytest.mark.parametrize("name", LOGIT_CASES)
def test_logits_equal_those_of_transformers_and_an_untouched_export_is_the_same_files(name, tmp_path):
    write_folder(tmp_path / "base", GOLDEN["cases"][name])
    params, config = load(tmp_path / "base")
    expected = np.load(LOGITS)[name]
    at = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    hidden = decoder.forward(params, config, jnp.asarray(TOKENS), at, jnp.zeros_like(at), at + 1)
    np.testing.assert_allclose(decoder.logits(params, config, hidden), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected).max() > 1
    checkpoints.export(params, base=tmp_path / "base", out=tmp_path / "out")
    for file in ("config.json", "model.safetensors"):
        ours, theirs = ((tmp_path / folder / file).read_bytes() for folder in ("out", "base"))
        assert json.loads(ours) == json.loads(theirs) if file == "config.json" else ours == theirs, file


def pairs_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Encoded.of(*(rng.integers(3, 41, size) for size in each)) for each in lengths]


LONG = pairs_of((9, 12, 7), (1, 5, 14), (14, 2, 9))  # beyond every window and trained length of the cases
SHORT = pairs_of((2, 3, 2), (1, 2, 4), (3, 1, 2))  # within all
SHAPE = packing.Shape(pairs=3, rows=6, row_length=64, microbatches=1, layout="shared")
LAYOUT_CASES = [
    name if name in ("gemma3_text-all", "llama-dynamic", "mixtral-all") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_every_layout_gives_the_log_probs_of_separate_sequences(name, tmp_path):
    """Packed rows, of prompts shared and repeated, against each completion in a row of its own."""
    write_folder(tmp_path, GOLDEN["cases"][name])
    params, config = load(tmp_path)
    logps_fn = jax.jit(make_logps_fn(config, pairs=SHAPE.pairs))

    def score(pairs, layout_name):
        batch = layout.collate(pairs, None, dataclasses.replace(SHAPE, layout=layout_name))
        assert batch.count == 1
        return np.asarray(logps_fn(params, jax.tree.map(lambda x: x[0], batch.rows))[0])

    def separate(pair):
        none = pair.prompt[:0]
        halves = pair._replace(rejected=none), pair._replace(chosen=none)
        return [score([half], "repeated")[0, side] for side, half in enumerate(halves)]

    fitted, chosen = checks.fit(configs.Config(), config, lengths_of(LONG))
    apart = fitted.needs_whole_sequences  # and not for windows that none of these reaches
    assert chosen == ("repeated" if apart else "shared")
    assert checks.fit(configs.Config(), config, lengths_of(SHORT))[1] == "shared"
    for pairs, layouts in ((LONG, ("repeated",) if apart else layout.LAYOUTS), (SHORT, layout.LAYOUTS)):
        expected = np.array([separate(pair) for pair in pairs])
        for each in layouts:
            np.testing.assert_allclose(score(pairs, each), expected, rtol=2e-6, err_msg=each)
    if apart:
        assert np.abs(score(LONG, "shared") - np.array([separate(pair) for pair in LONG])).max() > 1e-3


def lengths_of(pairs):
    return np.array([pair.lengths for pair in pairs])
