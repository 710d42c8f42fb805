"""Preferences as chat messages, for any model with a chat template: adapters by default, or the whole model.

    dpo-jax train --config=configs/chat.py --workdir=runs/chat \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.train=pairs.jsonl
    dpo-jax train --config=configs/chat.py:full ...      # every parameter trains

A row holds `prompt`, `chosen` and `rejected` as lists of {"role", "content"}, or as text, which is read as the messages
of a user and an assistant; for rankings and unpaired rows give `--config.data.format=auto`. Held-out pairs are named
with `--config.data.eval=FILE`. Batch, beta, schedule and the learning rate of the whole model are those of Zephyr
(Tunstall et al. 2023, arXiv:2310.16944, section 4). Adapters learn with ten times that rate, as in the example commands
of TRL's DPO script.
"""

from dpo_jax.config import base
from dpo_jax.types import InputError


def get_config(arg: str = "lora"):
    if arg not in ("lora", "full"):
        remedy = "Give --config=configs/chat.py or --config=configs/chat.py:full."
        raise InputError("configs/chat.py", got=f"{arg!r} after the colon", expected="lora or full", remedy=remedy)
    config = base()
    config.data.format = "chat"  # text is read as messages too, so that every row passes through the chat template
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.loss.beta = 0.1
    config.train.batch_pairs = 32
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.1
    config.checkpoint.every_steps = 100
    if arg == "full":
        config.optimizer.learning_rate = 5e-7
    else:
        config.lora.rank = 16
        config.model.param_dtype = "bfloat16"  # of the frozen model; adapters are float32
        config.optimizer.learning_rate = 5e-6
    return config
