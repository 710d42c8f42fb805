"""A run small enough for tests: readable pairs, a tokenizer made of them, and a random two-layer model."""

import contextlib
import itertools
import json

from dpo_jax import config
from dpo_jax.demo import quickstart
from dpo_jax.run import choices, goodput, inputs, programs, update_batches
from tests.support import hf_folders

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
    chosen.data.columns = "chosen_reward=,rejected_reward="
    chosen.data.max_length, chosen.data.max_prompt_length = 128, 64
    chosen.data.row_length = 128  # that of these pairs; to find it takes longer than to train on them
    chosen.train.batch_pairs, chosen.train.steps = 8, STEPS
    chosen.optimizer.learning_rate, chosen.optimizer.warmup_steps = 1e-2, 2
    chosen.checkpoint.every_steps = 2
    with chosen.ignore_type():
        chosen.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config.freeze(chosen)


def load_inputs(config, *, training=True):
    """Inputs of a run, as `run.inputs.load_inputs` reads them."""
    return inputs.load_inputs(config, choices.objective_of(config.loss), training=training)


def make_programs(config, read, **options):
    """Programs of a run with these inputs."""
    return programs.make_programs(config, read.objective, read.model, read.lengths, **options)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = {"step_time_s", "pairs_per_s", "eval_time_s", "data_wait_s", "tokens_real/s", "flops/s", "minor_faults"}
TIMES |= {*goodput.FIELDS}


def untimed(rows):
    """Rows without what a clock decides."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


class Killed(BaseException):
    """Raised in place of a signal."""


@contextlib.contextmanager
def killed_at(step, monkeypatch):
    """Runs inside are killed when they make the batch of the `step`-th update that they make."""
    steps, real = itertools.count(), update_batches.make_batch

    def make_batch(*args, **kwargs):
        if next(steps) == step:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(update_batches, "make_batch", make_batch)
        yield


def unpaired(row, index):
    """One of a pair's answers by itself, by turns the better and the worse."""
    side = ("chosen", "rejected")[index % 2]
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


def ranked(row, index):
    """A pair's answers and others, shorter ones being worse; four of them, or three."""
    words = row["rejected"].split()
    worse = [" " + " ".join(words[: len(words) // 2 - n]) for n in range(1 + index % 2)]
    responses = [row["rejected"], row["chosen"], *worse]
    return {"prompt": row["prompt"], "responses": responses, "scores": [3, 4, *range(2, 2 - len(worse), -1)]}


def convert(folder, how, into):
    """Writes the pairs of `folder` in another form, a row each, next to the same model."""
    into.mkdir(parents=True, exist_ok=True)
    for name in ("train", "eval"):
        rows = read_rows(folder / f"{name}.jsonl")
        (into / f"{name}.jsonl").write_text("".join(json.dumps(how(row, i)) + "\n" for i, row in enumerate(rows)))
    (into / "model").symlink_to(folder / "model")
    return into
