"""Pythia 2.8B on Anthropic's HH, as in the DPO paper."""

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
