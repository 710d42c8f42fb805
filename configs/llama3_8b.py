"""Llama 3 8B, fine-tuned on UltraChat, trained on UltraFeedback with hyperparameters of Zephyr and SimPO.

    dpo-jax train --config=configs/llama3_8b.py --workdir=/shared/llama3_8b

Run this on every host. The batch size is that of SimPO's DPO baseline, the rest is Zephyr's. For other preferences as
chat messages: `--config.data.train=FILE`. For 61,135 pairs with a median of 120 prompt and 240 answer tokens,
`dpo-jax plan --topology=...` predicts at best:

    hardware                             HBM per chip       step      bound by   MFU    chip-hours in total
    v5p:4x4x4                            6.4 of 95.7 GiB    0.165 s   compute    91 %   1.9
    v6e:8x8                              6.4 of 31.2 GiB    0.249 s   ICI        30 %   2.9
    v5e:16x16, --config.mesh.tensor=8    3.4 of 15.8 GiB    0.176 s   ICI        50 %   8.5
"""

from dpo_jax.config import base


def get_config(arg: str = ""):
    config = base()
    config.model.path = "princeton-nlp/Llama-3-Base-8B-SFT"  # fine-tuned on UltraChat
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    config.data.on_bad_row = "skip"  # some answers are empty, and some pairs have two equal answers
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.loss.beta = 0.01
    config.train.batch_pairs = 128
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 48  # a tenth of all updates
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 100
    config.mesh.tensor = 4
    config.plan.architecture = "configs/architectures/llama3_8b.json"
    config.plan.pairs = 61_135
    config.plan.prompt_tokens = 120
    config.plan.answer_tokens = 240
    return config
