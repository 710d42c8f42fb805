"""Anthropic HH, transcripts in one text with the prompt inside; the recipe of the DPO paper, for a model of any size.

    dpo-jax train --config=configs/hh.py --workdir=runs/hh \\
        --config.model.path=EleutherAI/pythia-2.8b \\
        --config.data.train=Anthropic/hh-rlhf:train --config.data.eval=Anthropic/hh-rlhf:test

The paper fine-tunes on the chosen answers first: give `--config.sft.steps`, or a model.path that already was.
With local files, of this form or another: `--config.data.train=train.jsonl.gz --config.data.eval=eval.jsonl.gz`.
"""

from dpo_jax.config import base


def get_config(arg: str = ""):
    config = base()
    config.data.train = "Anthropic/hh-rlhf:train"
    config.data.eval = "Anthropic/hh-rlhf:test"
    config.data.on_bad_row = "skip"  # some transcripts end in an empty answer, or in the same one twice
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.loss.beta = 0.1
    config.train.batch_pairs = 64
    config.sft.learning_rate = 5e-7
    config.optimizer.name = "rmsprop"
    config.optimizer.b2 = 0.99  # torch's default, which the paper's code leaves
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 10.0
    return config
