"""Llama 3 70B on UltraFeedback: the 8B recipe with a smaller learning rate and a larger batch.

    dpo-jax train --config=configs/llama3_70b.py --workdir=/shared/llama3_70b

Run this on every host of a v5p:8x8x8 slice (512 chips), whose 64 rows per microbatch the batch fills. For 61,135 pairs
with a median of 120 prompt and 240 answer tokens, `dpo-jax plan --topology=v5p:8x8x8` predicts 16.2 of 95.7 GiB per
chip, at best 0.38 s per step, bound by compute, MFU 92 %, and 17.2 chip-hours in total.
"""

import runpy
from pathlib import Path


def get_config(arg: str = ""):
    config = runpy.run_path(str(Path(__file__).with_name("llama3_8b.py")))["get_config"]()
    config.model.path = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.train.batch_pairs = 256
    config.optimizer.learning_rate = 2e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 24  # a tenth of all updates
    config.eval.every_steps = 50
    config.checkpoint.every_steps = 50
    config.mesh.tensor = 8
    config.plan.architecture = "configs/architectures/llama3_70b.json"
    return config
