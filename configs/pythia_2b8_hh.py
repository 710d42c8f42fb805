"""Pythia 2.8B on Anthropic's HH, the run of the DPO paper: a pass of fine-tuning on the chosen answers, then a pass of DPO.

    dpo-jax train --config=configs/pythia_2b8_hh.py --workdir=runs/pythia_2b8_hh

on one machine, or on every host. What `dpo-jax plan --topology=...` says of DPO on 160,800 pairs with a median of
100 + 60 tokens, at best:

PLANS
"""

import runpy
from pathlib import Path


def get_config(arg: str = ""):
    config = runpy.run_path(str(Path(__file__).with_name("hh.py")))["get_config"]()
    config.model.path = "EleutherAI/pythia-2.8b"
    config.sft.steps = 2512  # one pass over the 160,800 chosen answers
    config.plan.architecture = "configs/architectures/pythia_2b8.json"
    config.plan.pairs = 160_800
    config.plan.prompt_tokens = 100
    config.plan.answer_tokens = 60
    return config
