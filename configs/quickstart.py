"""The whole method on two CPU cores, with no network and no files but what it makes: a first run, and a check of a build.

    dpo-jax train --config=configs/quickstart.py --workdir=runs/quickstart

It makes pairs with a known reward, a tokenizer and a random 2.2M-parameter Llama (see dpo_jax/quickstart.py), fine-tunes
it on the chosen answers, scores the reference, runs one epoch of DPO, evaluates on requests that training never
saw, and exports. Two cores of a laptop are enough.
"""

from dpo_jax.config import base


def get_config(arg: str = ""):
    config = base()
    config.prepare = "dpo_jax.quickstart:prepare"
    config.model.path = "{workdir}/inputs/model"
    config.data.train = "{workdir}/inputs/train.jsonl"
    config.data.eval = "{workdir}/inputs/eval.jsonl"
    config.data.cache_dir = "{workdir}/cache"
    config.data.max_length = 128
    config.data.max_prompt_length = 64
    config.data.row_length = 152  # two pairs, the longest being 74 tokens
    # Rates for a small model from random weights; a pretrained one wants a thousandth of them.
    config.sft.steps = 100
    config.sft.batch_pairs = 32
    config.sft.learning_rate = 3e-3
    config.sft.warmup_steps = 10
    config.train.batch_pairs = 32
    config.train.microbatch_rows = 8
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10
    return config
