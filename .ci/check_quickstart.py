"""Fails unless the run in a working folder began at the reference, learned, and left a model to load."""

import json
import math
import sys
from pathlib import Path

folder = Path(sys.argv[1])
rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
first, last = rows[0], rows[-1]
accuracy = last["eval/rewards/accuracies"]
steps = len((folder / "metrics.jsonl").read_text().splitlines())
weights = sorted(path.name for path in (folder / "export").glob("*.safetensors"))
checks = {
    f"the policy begins as the reference: loss {first['eval/loss']:.6f} is log 2": math.isclose(
        first["eval/loss"], math.log(2), abs_tol=1e-4
    ),
    f"the loss falls: {first['eval/loss']:.4f} to {last['eval/loss']:.4f}": last["eval/loss"] < first["eval/loss"],
    f"held-out accuracy {accuracy:.3f} is at least 0.90": accuracy >= 0.90,
    f"steps were logged: {steps} rows": steps > 0,
    f"weights were exported: {weights}": bool(weights),
}
for claim, holds in checks.items():
    print("ok  " if holds else "FAIL", claim)
sys.exit(not all(checks.values()))
