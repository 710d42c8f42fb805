"""Qwen3 8B on UltraFeedback: the Llama 3 8B recipe with another model.

    dpo-jax train --config=configs/qwen3_8b.py --workdir=/shared/qwen3_8b

Run this on every host. For 61,135 pairs with a median of 120 prompt and 240 answer tokens, `dpo-jax plan
--topology=...` predicts at best:

    hardware                             HBM per chip       step      bound by   MFU    chip-hours in total
    v5p:4x4x4                            6.6 of 95.7 GiB    0.166 s   compute    91 %   1.9
    v6e:8x8                              6.6 of 31.2 GiB    0.263 s   ICI        29 %   3.0
    v5e:16x16, --config.mesh.tensor=8    3.6 of 15.8 GiB    0.190 s   ICI        46 %   9.2
"""

import runpy
from pathlib import Path


def get_config(arg: str = ""):
    config = runpy.run_path(str(Path(__file__).with_name("llama3_8b.py")))["get_config"]()
    config.model.path = "Qwen/Qwen3-8B"
    config.plan.architecture = "configs/architectures/qwen3_8b.json"
    return config
