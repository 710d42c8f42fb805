"""Pythia 2.8B on Anthropic HH, as in the DPO paper: one epoch of fine-tuning on the chosen answers, then DPO.

    dpo-jax train --config=configs/pythia_2b8_hh.py --workdir=runs/pythia_2b8_hh

Run this on one machine, or on every host. For DPO without the fine-tuning, on 160,800 pairs with a median of 100 prompt
and 60 answer tokens, `dpo-jax plan --topology=...` predicts at best:

    hardware    HBM per chip       step      bound by   MFU    chip-hours in total
    h100:8      5.9 of 80.0 GiB    0.130 s   NVLink     26 %   0.9
    v5e:4x4     5.1 of 15.8 GiB    0.415 s   ICI        21 %   5.3
"""

import runpy
from pathlib import Path


def get_config(arg: str = ""):
    config = runpy.run_path(str(Path(__file__).with_name("hh.py")))["get_config"]()
    config.model.path = "EleutherAI/pythia-2.8b"
    config.sft.steps = 2512  # one epoch over the 160,800 chosen answers
    config.plan.architecture = "configs/architectures/pythia_2b8.json"
    config.plan.pairs = 160_800
    config.plan.prompt_tokens = 100
    config.plan.answer_tokens = 60
    return config
