"""Names that other code imports: they stay importable where they were, and the package says that it is typed."""

import importlib
import tomllib
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import dpo_jax
from dpo_jax import losses, steps

# Public names of release 0.1, by module.
NAMES = {
    "losses": """LOSSES REFERENCE_FREE SUMS Loss Objective aot aot_unpaired apo_down apo_zero bco_pair beta_dpo cpo
        desensitised discopop dpo_positive estimate_kl exo_pair f_scores hinge ipo kto make_loss nca_pair needs_of
        options_of orpo plackett_luce rewards_of robust sft sigmoid sigmoid_norm simpo sppo_hard start_of tdpo1 tdpo2
        wpo_weights""",
    "steps": """LogpsFn Crop TrainState init_state make_train_step scores_first judge summarise summarize apply_updates
        make_score_step""",
    "types": "InputError check_choice Row Pair Encoded AnswerTokens Pairs Rows Batch",
    "logprobs": "SUMS completion_logps sum_by_slot score_tokens",
    "scoring": """WORDS DTYPES Scored compute_dtype make_logps_fn join of_words kernel_across experts_across
        score_pairs""",
    "sharding": """AXES ROW_AXES LARGE AnyMesh Rules RULES parse_rules mesh_shape make_mesh slice_of row_shards
        shards_here shardings partition whole_everywhere divides sum_scattered everywhere batch_shardings put from_parts
        path_name bytes_per_device""",
    "metrics": "pair_metrics",
    "optim": "Schedule DECAYS NOT_DECAYED OPTIMIZERS make_optimizer make_schedule decayed",
}
MOVED = {  # of those, the ones that warn
    "steps": {"Crop", "summarise"},
    "sharding": {"path_name", "everywhere", "whole_everywhere"},
    "scoring": {"join", "WORDS", "of_words", "kernel_across", "experts_across"},
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_still_import(module):
    place = importlib.import_module(f"dpo_jax.{module}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert [name for name in NAMES[module].split() if not hasattr(place, name)] == []


@pytest.mark.parametrize("module, name", [(module, name) for module, names in MOVED.items() for name in sorted(names)])
def test_a_name_that_moved_says_where_to(module, name):
    place = importlib.import_module(f"dpo_jax.{module}")
    with pytest.warns(DeprecationWarning, match=f"dpo_jax.{module}.{name} is now dpo_jax"):
        getattr(place, name)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dpo_jax.steps' has no attribute 'unheard_of'"):
        _ = steps.unheard_of


def test_losses_and_metrics_of_pairs_are_still_called_as_they_were():
    loss_fn, logps = losses.make_loss("sigmoid", {}), jnp.array([[-1.0, -2.0]])
    compared = jnp.zeros((1, 2)), jnp.ones((1, 2), jnp.int32), jnp.ones(1, bool)
    with pytest.warns(DeprecationWarning, match="judge is now pair_losses"):
        each, running = steps.judge(loss_fn, (logps, {}), {}, *compared)
    with pytest.warns(DeprecationWarning, match="summarize is now loss_metrics"):
        metrics = steps.summarize(loss_fn, each, (logps, {}), *compared, paired=True)
    np.testing.assert_array_equal(metrics["loss"], each[0])
    assert running == {}


def test_package_is_marked_as_typed_and_the_mark_is_packaged():
    root = Path(dpo_jax.__file__).parent
    packaged = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (root / "py.typed").is_file() and "py.typed" in packaged["dpo_jax"]
