"""A run small enough for tests: readable pairs, a tokenizer made of them, and a random two-layer model."""

import itertools
import json

from dpo_jax import config, quickstart
from tests import hf_folders

TRAIN_PAIRS, EVAL_PAIRS, STEPS = 40, 12, 6


def make_inputs(folder, *, train_pairs=TRAIN_PAIRS, eval_pairs=EVAL_PAIRS, base=hf_folders.LLAMA):
    """Writes train.jsonl, eval.jsonl and model/, of the family of `base`, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {
        "train": list(itertools.islice(quickstart.preferences(0, held_out=False), train_pairs)),
        "eval": list(itertools.islice(quickstart.preferences(0, held_out=True), eval_pairs)),
    }
    for name, rows in pairs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    tokenizer = quickstart.train_tokenizer(text for row in pairs["train"] for text in row[:3])
    shape = dict(vocab_size=quickstart.VOCAB_SIZE, max_position_embeddings=256, num_hidden_layers=2, eos_token_id=0)
    hf_folders.save(folder / "model", base | shape)
    tokenizer.save_pretrained(folder / "model")
    return folder


def make_config(folder, **fields):
    """A configuration over those inputs; fields by dotted name, dots written as double underscores."""
    chosen = config.base()
    chosen.model.path = str(folder / "model")
    chosen.data.train = str(folder / "train.jsonl")
    chosen.data.eval = str(folder / "eval.jsonl")
    chosen.data.max_length, chosen.data.max_prompt_length = 128, 64
    chosen.train.batch_pairs, chosen.train.steps = 8, STEPS
    chosen.optimizer.learning_rate, chosen.optimizer.warmup_steps = 1e-2, 2
    chosen.checkpoint.every_steps = 2
    with chosen.ignore_type():
        chosen.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config.freeze(chosen)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = {"step_time_s", "pairs_per_s", "eval_time_s", "data_wait_s", "tokens_real/s", "flops/s", "minor_faults"}


def untimed(rows):
    """Rows without what a clock decides."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
