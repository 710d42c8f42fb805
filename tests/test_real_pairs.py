"""The claims of the layout on real preference pairs; skipped where the data is not at hand."""

import functools
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from dpo_jax import config, flags, losses, scoring, steps, train
from dpo_jax.data import dataset, layout, packing
from dpo_jax.hf import checkpoints
from dpo_jax.logprobs import completions
from dpo_jax.models import decoder, rope
from dpo_jax.models.config import DecoderConfig, LayerKind
from dpo_jax.reporting import data_summary
from dpo_jax.run.programs import CPU_POSITIONS
from dpo_jax.types import Encoded, Rows
from tests.support.hf_folders import LLAMA, NEOX, save
from tests.support.runs import load_inputs, read_rows, untimed

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TRAIN, EVAL = DATA / "hh_harmless_train.jsonl.gz", DATA / "hh_harmless_eval.jsonl.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRAIN.exists(), reason="needs ../shared/data, which is not part of the project"),
]

SHAPES = {
    "llama": LLAMA
    | dict(
        vocab_size=50304,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=2048,
        eos_token_id=0,
    ),
    "gpt_neox": NEOX
    | dict(
        vocab_size=50304,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=8,
        max_position_embeddings=2048,
        eos_token_id=0,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Llama- and a Pythia-shaped checkpoint with the GPT-NeoX tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    backend = tokenizers.Tokenizer.from_file(str(DATA / "gpt_neox_20b_tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    for name, hf in SHAPES.items():
        save(folder / name, hf)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The first real pairs, for runs of a few updates: the reference scores every pair of its data."""
    path = tmp_path_factory.mktemp("few") / "train.jsonl"
    with gzip.open(TRAIN, "rt") as lines:
        path.write_text("".join(itertools.islice(lines, 100)))
    return path


def configured(models, **fields):
    chosen = flags.load(
        str(ROOT / "configs" / "hh.py"),
        [
            f"model.path={models / fields.pop('family', 'llama')}",
            f"data.train={TRAIN}",
            f"data.eval={EVAL}",
            *(f"{k.replace('__', '.')}={v}" for k, v in fields.items()),
        ],
    )
    return chosen


VOCABULARY = 1024  # ids are folded into it, so that float64 is affordable; a layout does not look at ids


def folded_pairs(models, family, count):
    """The first real pairs with their ids folded, and their token counts."""
    found = load_inputs(configured(models, family=family, data__eval=""), training=True).sets["train"]
    assert found is not None
    folded = ((ids % VOCABULARY for ids in (found[i].prompt, *found[i].answers)) for i in range(count))
    return [Encoded.of(*ids) for ids in folded], found.lengths[:count]


def model_of(family):
    """A model whose numbers are of ordinary size, so that log-probs are no accident of tiny weights."""
    llama = family == "llama"
    shape = DecoderConfig(
        vocab_size=VOCABULARY,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2 if llama else 4,
        head_dim=16,
        mlp_width=128,
        max_positions=2048,
        kinds=(LayerKind(rope.usual(16 if llama else 4)),),
        norm="rmsnorm" if llama else "layernorm",
        gated=llama,
        parallel_residual=not llama,
        activation="silu" if llama else "gelu",
    )
    return shape, jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, decoder.init(key, shape)))(jax.random.key(0))


def alone(found):
    """Every completion as a row of its own, right-padded, in batches of one length: the plain way to score it."""
    sequences = [(i, side, pair.prompt, pair[1 + side]) for i, pair in enumerate(found) for side in (0, 1)]
    sequences.sort(key=lambda s: len(s[2]) + len(s[3]))
    for at in range(0, len(sequences), 16):
        group = sequences[at : at + 16]
        length = -(-max(len(p) + len(a) for _, _, p, a in group) // 128) * 128
        index = np.tile(np.arange(length), (16, 1))
        rows = Rows(index * 0, index, index * 0, index + 1, index * 0, index * 0, index * 0 - 1)
        for r, (_, _, prompt, answer) in enumerate(group):
            n, m = len(prompt), len(answer)
            rows.tokens[r, : n + m] = [*prompt, *answer]
            rows.source[r, :m], rows.target[r, :m] = np.arange(n - 1, n + m - 1), answer
            rows.slot[r, :m] = r  # slot r of sixteen: as if eight pairs
        yield group, jax.tree.map(jnp.asarray, rows)


def scorer(shape, dtype, count):
    def logps(params, rows):
        hidden = decoder.forward(params, shape, *rows[:4], options=decoder.BlockOptions(dtype))
        return completions.completion_logps(hidden, params["head"]["embedding"], rows, pairs=count)[:2]

    return logps


@pytest.mark.parametrize(("family", "dtype", "bound"), [("gpt_neox", "float64", 1e-9), ("llama", "float32", 2e-6)])
def test_packed_and_shared_equals_each_completion_alone(models, family, dtype, bound):
    some, lengths = folded_pairs(models, family, 1000)
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        shape, params = model_of(family)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        grid = packing.choose_shape(
            lengths,
            layout="shared",
            pairs=250,
            row_length=None,
            rows=2,
            shards=1,
            target_positions=1,
        )
        score = jax.jit(steps.make_score_step(scorer(shape, jnp.dtype(dtype), 250), has_aux=True))
        packed = np.zeros((1000, 2))
        for part in scoring.score_pairs(functools.partial(score, params), some, lengths, shape=grid):
            packed[part.indices] = part.logps
        single = np.zeros((1000, 2))
        one = jax.jit(scorer(shape, jnp.dtype(dtype), 8))
        for group, rows in alone(some):
            logps, _ = one(params, rows)
            for r, (i, side, *_) in enumerate(group):
                single[i, side] = logps.reshape(-1)[r]
    finally:
        jax.config.update("jax_enable_x64", False)
    worst = np.max(np.abs(packed / single - 1))
    print(f"{family} {dtype}: largest relative difference over 2000 completions {worst:.2e}")
    assert worst < bound


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-4)])
def test_gradient_of_a_packed_batch_equals_that_of_completions_alone(models, family, dtype, bound):
    some, lengths = folded_pairs(models, family, 8)
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        shape, params = model_of(family)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        reference = np.array([[-200.0, -210.0]] * 8)
        shape_of: dict[str, Any] = dict(layout="shared", pairs=8, row_length=None, rows=8, shards=1, target_positions=1)
        grid = packing.choose_shape(lengths, **shape_of)
        batch = jax.tree.map(jnp.asarray, layout.collate(some, reference, grid))
        ((group, rows),) = alone(some)
        order = np.array([2 * i + side for i, side, *_ in group])

        def packed(p):
            logps, _ = scorer(shape, jnp.dtype(dtype), 8)(p, jax.tree.map(lambda x: x[0], batch.rows))
            return losses.sigmoid(logps, jnp.asarray(reference, dtype)).mean()

        def single(p):
            logps, _ = scorer(shape, jnp.dtype(dtype), 8)(p, rows)
            placed = jnp.zeros(16, dtype).at[order].set(logps.reshape(-1)).reshape(8, 2)
            return losses.sigmoid(placed, jnp.asarray(reference, dtype)).mean()

        ours, theirs = jax.jit(jax.grad(packed))(params), jax.jit(jax.grad(single))(params)
    finally:
        jax.config.update("jax_enable_x64", False)
    distance = [
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
    ]
    print(f"{family} {dtype}: largest relative distance of a leaf's gradient {max(distance):.2e}")
    assert max(distance) < bound


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(1024, 512), (512, 256)])
def test_rows_are_full_and_compute_a_quarter_of_padded_batches(models, max_length, max_prompt_length):
    # At the default lengths and the recipe's, 64 pairs a step; empty rows count as computed.
    chosen = configured(models, data__max_length=max_length, data__max_prompt_length=max_prompt_length)
    found = load_inputs(chosen, training=True)
    shape_of: dict[str, Any] = dict(layout="shared", pairs=64, row_length=None, rows=None, shards=1)
    shape = packing.choose_shape(found.lengths, **shape_of, target_positions=CPU_POSITIONS)
    computed, real, padded = np.sum(
        [*data_summary.positions_per_step(found.sets["train"], shape, seed=chosen.seed, shuffle=chosen.data.shuffle)],
        axis=0,
    )
    print(f"at {max_length}/{max_prompt_length}: fill {real / computed:.4f}, of padded batches {computed / padded:.4f}")
    assert real / computed >= 0.95 and computed / padded <= 0.29


@pytest.mark.parametrize("family", ["gpt_neox"])
def test_hh_recipe_trains_resumes_and_exports(models, few, tmp_path, family):
    fields = dict(
        family=family, train__batch_pairs=8, train__steps=4, checkpoint__every_steps=2, optimizer__warmup_steps=1
    )
    chosen = configured(models, data__train=few, **fields)
    with pytest.MonkeyPatch.context() as patch:
        saved = train.Checkpoints.save

        def save_then_die(self, step, *rest):
            saved(self, step, *rest)
            if step == 2:
                raise KeyboardInterrupt

        patch.setattr(train.Checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train.run(chosen, tmp_path / "run")
    train.run(chosen, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    evaluations = read_rows(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 4] and evaluations[0]["eval/pairs"] == 212
    exported, _ = checkpoints.read_config(tmp_path / "run" / "export")
    assert exported == checkpoints.read_config(models / family)[0]


def test_run_killed_at_three_steps_equals_one_that_never_was(models, few, tmp_path):
    fields = dict(train__batch_pairs=8, train__steps=6, checkpoint__every_steps=1, optimizer__warmup_steps=1)
    fields |= dict(data__date="2024-02-29")  # config.json has the day on which a run began
    fields |= dict(optimizer__learning_rate=1e-3, reference__path=tmp_path / "reference", eval__every_steps=2)
    chosen = configured(models, data__train=few, **fields)
    (tmp_path / "config.json").write_text(config.to_json(chosen))
    command = [sys.executable, "-m", "dpo_jax", "train", f"--config={tmp_path / 'config.json'}"]
    environment = os.environ | {"XLA_FLAGS": ""}

    def start(workdir):
        return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment)

    assert start(tmp_path / "whole").wait(timeout=900) == 0
    for kill_at in (1, 3, 5):  # rows logged when the signal comes
        process, log = start(tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 900
        while not (log.exists() and log.read_bytes().count(b"\n") >= kill_at):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait(timeout=900) == 0
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert untimed(read_rows(tmp_path / "killed" / name)) == untimed(read_rows(tmp_path / "whole" / name))
    ours, theirs = ((tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "whole"))
    assert ours == theirs
    assert json.loads((tmp_path / "killed" / "config.json").read_text()) == json.loads(config.to_json(chosen))


def test_loading_twice_reads_the_cache(models):
    chosen = configured(models, data__eval="")
    first, second = (load_inputs(chosen, training=True).sets["train"] for _ in range(2))
    assert isinstance(first, dataset.PairSet) and isinstance(second, dataset.PairSet)
    assert first.digest == second.digest and isinstance(second.tokens, np.memmap)
