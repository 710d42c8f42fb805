"""Writes tests/support/golden/: the logits that transformers computes with the models of `family_cases`.

Tests compare with them and run without torch.

    python -m tests.support.make_golden

A case's weights are not kept: `weights_of` makes them again from the names and shapes that transformers saves.
"""

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.support.family_cases import CASES

FOLDER = Path(__file__).parent / "golden"
JSON, LOGITS = FOLDER / "families.json", FOLDER / "families.npz"
TOKENS = np.random.RandomState(1).randint(3, 41, (2, 24)).astype(np.int32)


def weights_of(tensors):
    """Returns random weights that depend on the names alone, so every machine gets the same ones.

    Norms and biases are random too, and all are large enough to make the model far from linear.
    """

    def numbers(name, shape):
        made = np.random.RandomState(zlib.crc32(name.encode())).normal(0.5 * (len(shape) == 1), 0.3, shape)
        return made.astype(np.float32)

    return {name: numbers(name, shape) for name, shape in tensors.items()}


def write_folder(folder, case):
    """Writes the checkpoint of a case as transformers would have saved it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case["config"]))
    save_file(weights_of(case["tensors"]), folder / "model.safetensors", metadata={"format": "pt"})


def saved_by_transformers(folder, kind, options):
    """Returns the configuration that transformers writes for these options, and names and shapes of the tensors."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 it is no dict
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": tensors}


def make(name):
    """Returns a case as transformers saves it, and the logits that transformers computes with its weights."""
    import torch
    import transformers

    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        case = saved_by_transformers(folder, *CASES[name])
        write_folder(folder, case)
        model, info = read(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return case, model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def main():
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made = {name: make(name) for name in CASES}
    FOLDER.mkdir(exist_ok=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    cases = {name: case for name, (case, _) in made.items()}
    JSON.write_text(json.dumps({"made_by": "python -m tests.support.make_golden", **versions, "cases": cases}) + "\n")
    np.savez_compressed(LOGITS, **{name: logits for name, (_, logits) in made.items()})


if __name__ == "__main__":
    main()
