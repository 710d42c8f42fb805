"""Llama 3 70B on UltraFeedback; learning rate and beta of the 8B recipe scaled down, a batch that fills 64 rows.

    dpo-jax train --config=configs/llama3_70b.py --workdir=/shared/llama3_70b

on every host of a v5p:8x8x8, whose 512 chips it takes: `dpo-jax plan --topology=v5p:8x8x8` says, of 61,135 pairs with a
median of 120 + 240 tokens, 16.2 of 95.7 GiB a chip, at best 0.38 s a step, bound by compute, MFU 92 %, and
17.2 chip-hours in all.
"""

from dpo_jax.config import base


def get_config(arg: str = ""):
    config = base()
    config.model.path = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    config.data.on_bad_row = "skip"  # some answers are empty, or the same twice
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.loss.beta = 0.01
    config.train.batch_pairs = 256
    config.optimizer.learning_rate = 2e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 24  # a tenth
    config.eval.every_steps = 50
    config.checkpoint.every_steps = 50
    config.mesh.tensor = 8
    config.plan.architecture = "configs/architectures/llama3_70b.json"
    config.plan.pairs = 61_135
    config.plan.prompt_tokens = 120
    config.plan.answer_tokens = 240
    return config
