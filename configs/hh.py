"""Anthropic HH with the hyperparameters of the DPO paper, for a model of any size.

    dpo-jax train --config=configs/hh.py --workdir=runs/hh \\
        --config.model.path=EleutherAI/pythia-2.8b \\
        --config.data.train=Anthropic/hh-rlhf:train --config.data.eval=Anthropic/hh-rlhf:test

The paper fine-tunes on the chosen answers first. Set `--config.sft.steps`, or use a `model.path` that is already
fine-tuned. For local files in any supported form:
`--config.data.train=train.jsonl.gz --config.data.eval=eval.jsonl.gz`; `--config.data.eval=` turns evaluation off.
"""

from dpo_jax.config import base


def get_config(arg: str = ""):
    config = base()
    config.data.train = "Anthropic/hh-rlhf:train"
    config.data.eval = "Anthropic/hh-rlhf:test"
    config.data.on_bad_row = "skip"  # some transcripts have an empty answer or two equal answers
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.loss.beta = 0.1
    config.train.batch_pairs = 64
    config.sft.learning_rate = 5e-7
    config.optimizer.name = "rmsprop"
    config.optimizer.b2 = 0.99  # alpha of torch.optim.RMSprop, which the code of the paper leaves at its default
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 10.0
    return config
