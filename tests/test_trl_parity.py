"""The loss curve of a run laid over TRL's: same checkpoint, pairs and order, float32, learning rate 1e-4."""

import argparse

import pytest

from tests.hf_folders import LLAMA, NEOX
from tests.runs import make_inputs

pytest.importorskip("torch")
pytest.importorskip("trl")

from benchmarks import vs_trl

pytestmark = pytest.mark.slow
PAIRS, STEPS = 4, 20


@pytest.mark.parametrize(("base", "accumulate"), [(LLAMA, 1), (NEOX, 2)], ids=["llama", "gpt_neox-two-batches"])
def test_loss_curve_has_parity_with_trl(tmp_path, base, accumulate):
    inputs = make_inputs(tmp_path / "inputs", train_pairs=PAIRS * STEPS, base=base)
    model = inputs / "model"
    pairs = tmp_path / "pairs.jsonl"
    vs_trl.write_pairs(str(inputs / "train.jsonl"), pairs, model, count=PAIRS * STEPS, max_length=128)
    args = argparse.Namespace(
        model=str(model),
        pairs_file=str(pairs),
        pairs=PAIRS,
        steps=STEPS,
        accumulate=accumulate,
        max_length=128,
        learning_rate=1e-4,
    )
    ours = vs_trl.run_ours(tmp_path, args)["losses"]
    theirs = vs_trl.run_trl(tmp_path, args)["losses"]
    distance = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"largest difference: {max(distance[:5]):.2e} over 5 steps, {max(distance):.2e} over {STEPS}")
    assert len(ours) == STEPS and max(ours) - min(ours) > 1e-3, "the curve must move for this to mean anything"
    assert max(distance[:5]) < 1e-4 and max(distance) < 1e-3
