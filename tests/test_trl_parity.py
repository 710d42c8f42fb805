"""The loss curve of a run laid over TRL's: same checkpoint, pairs and order, float32, learning rate 1e-4."""

import argparse
import dataclasses
import importlib
import inspect
import shutil
from pathlib import Path

import pytest
import transformers

from dpo_jax.demo import quickstart
from dpo_jax.fields import trl
from tests.support import make_golden
from tests.support.family_cases import CASES
from tests.support.hf_folders import LLAMA, NEOX
from tests.support.runs import make_inputs, read_rows

pytest.importorskip("torch")
pytest.importorskip("trl")

from benchmarks import common, vs_trl

pytestmark = pytest.mark.slow
PAIRS, STEPS = 4, 20
FEW_STEPS = 3  # the loss of the model itself, and after each of two updates
FAMILIES = [name for name in CASES if name.endswith("-all") and not name.startswith("llama-yarn")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Pairs, and a model of two layers, for few steps."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), train_pairs=PAIRS * FEW_STEPS)


def curves(tmp_path, inputs, *, steps, accumulate=1, adapter="", loss=None, settings=None, least=1e-3, chat=None):
    """Losses of dpo_jax and of TRL, from the model and the pairs of a folder.

    Args:
      chat: rows of messages in place of the folder's pairs.
      loss: fields of `config.loss`.
      settings: what TRL calls the same.
      least: what the losses of a curve must differ by.
    """
    pairs = tmp_path / "pairs.jsonl"
    if chat is None:
        vs_trl.write_pairs(str(inputs / "train.jsonl"), pairs, inputs / "model", count=PAIRS * steps, max_length=128)
    else:
        common.write_rows(chat, pairs)
    args = argparse.Namespace(
        model=str(inputs / "model"),
        pairs_file=str(pairs),
        pairs=PAIRS,
        steps=steps,
        accumulate=accumulate,
        max_length=128,
        adapter=adapter,
        learning_rate=1e-2 if adapter else 1e-4,
        # The row length that is found for these pairs: to find it takes longer than to train on them.
        fields={"data.row_length": 128, "data.format": "plain" if chat is None else "chat"}
        | {f"loss.{name}": value for name, value in (loss or {}).items()},
    )
    ours = vs_trl.run_ours(tmp_path, args)["losses"]
    # TRL weighs the balance of experts as config.json says, unless told not to.
    settings = vs_trl.FLOAT32 | {"router_aux_loss_coef": 0.0} | (settings or {})
    theirs = vs_trl.run_trl(tmp_path, args, settings)["losses"]
    assert len(ours) == len(theirs) == steps
    assert max(ours) - min(ours) > least, "the curve must move for this to mean anything"
    return ours, theirs


@pytest.mark.parametrize(("base", "accumulate"), [(LLAMA, 1), (NEOX, 2)], ids=["llama", "gpt_neox-two-batches"])
def test_loss_curve_has_parity_with_trl(tmp_path, base, accumulate):
    inputs = make_inputs(tmp_path / "inputs", train_pairs=PAIRS * STEPS, base=base)
    both = curves(tmp_path, inputs, steps=STEPS, accumulate=accumulate)
    distance = [abs(a - b) for a, b in zip(*both, strict=True)]
    print(f"largest difference: {max(distance[:5]):.2e} over 5 steps, {max(distance):.2e} over {STEPS}")
    assert max(distance[:5]) < 1e-4 and max(distance) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_parity_with_trl(tmp_path, inputs, name):
    """With a checkpoint that transformers saved, every option of its configuration moved."""
    inputs = shutil.copytree(inputs, tmp_path / "inputs")
    positions = "n_positions" if name.startswith("gpt2") or name.startswith("gptj") else "max_position_embeddings"
    shape = {"vocab_size": quickstart.VOCAB_SIZE, positions: 256, "eos_token_id": 0}
    kind, options = CASES[name]
    case = make_golden.saved_by_transformers(tmp_path / "saved", kind, options | shape)
    make_golden.write_folder(inputs / "model", case)
    shutil.rmtree(tmp_path / "saved")
    ours, theirs = curves(tmp_path, inputs, steps=FEW_STEPS)
    distance = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: largest difference {distance:.2e}, losses {min(ours):.4f} to {max(ours):.4f}")
    assert distance < 1e-4


@pytest.mark.parametrize(("base", "targets"), [(LLAMA, "all-linear"), (NEOX, ["query_key_value", "dense_4h_to_h"])])
def test_curve_of_adapters_has_parity_with_trl(tmp_path, base, targets):
    """From one adapter of PEFT's own start, all linear maps, or maps stored as one and others."""
    peft = pytest.importorskip("peft")
    inputs = make_inputs(tmp_path / "inputs", train_pairs=PAIRS * FEW_STEPS, base=base)
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    chosen = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True)
    peft.get_peft_model(model, chosen).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    ours, theirs = curves(tmp_path, inputs, steps=FEW_STEPS, adapter=adapter)
    distance = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"adapters: largest difference {distance:.2e}, losses {min(ours):.4f} to {max(ours):.4f}")
    assert distance < 1e-4


OBJECTIVES = {
    "hinge": ({"name": "hinge"}, {"loss_type": ["hinge"]}),
    "ipo": ({"name": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": ({"name": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "sigmoid_norm": ({"name": "sigmoid_norm", "beta": 5.0}, {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    "exo_pair": ({"name": "exo_pair", "label_smoothing": 0.1}, {"loss_type": ["exo_pair"], "label_smoothing": 0.1}),
    "nca_pair": ({"name": "nca_pair"}, {"loss_type": ["nca_pair"]}),
    "sppo_hard": ({"name": "sppo_hard", "beta": 0.1}, {"loss_type": ["sppo_hard"]}),
    "apo_zero": ({"name": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"name": "apo_down"}, {"loss_type": ["apo_down"]}),
    "discopop": ({"name": "discopop"}, {"loss_type": ["discopop"]}),
    "aot": ({"name": "aot", "label_smoothing": 0.1}, {"loss_type": ["aot"], "label_smoothing": 0.1}),
    "aot_unpaired": ({"name": "aot_unpaired"}, {"loss_type": ["aot_unpaired"]}),
    "forward_kl": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js_divergence": ({"divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    "alpha_divergence": (  # their coefficient is 1 - alpha
        {"divergence": "alpha_divergence", "divergence_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "ld": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "wpo": ({"wpo": True}, {"use_weighting": True}),
    "mpo": (
        {"name": "sigmoid*0.8,nca_pair*0.2,sft"},
        {"loss_type": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_parity_with_trl(tmp_path, inputs, name):
    loss, settings = OBJECTIVES[name]
    # This model would have written nothing of the pairs, so that WPO weighs them next to nothing.
    least = 1e-10 if name == "wpo" else 1e-3
    ours, theirs = curves(tmp_path, inputs, steps=FEW_STEPS, loss=loss, settings=settings, least=least)
    distance = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))
    print(f"{name}: largest difference {distance:.2e} of the loss, losses {min(ours):.4g} to {max(ours):.4g}")
    assert distance < 1e-4


# Without marks dpo_jax finds turns by rendering prefixes; TRL's side of the test finds them by marks.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Customer:' + m.content + '\n' }}"
    "{% else %}{{ 'Desk:' }}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Desk:' }}{% endif %}"
)
SPOKEN = "{{ m.content + eos_token }}"
MARKED = TEMPLATE.replace(SPOKEN, "{% generation %}" + SPOKEN + "{% endgeneration %}")


def conversations(rows, count):
    """Rows of messages whose answers are two turns of the desk, with one of the customer between them."""

    def answer(first, then):
        last = then.partition(".")[0] + "."
        turns = [("assistant", first), ("user", " Are you sure?"), ("assistant", last)]
        return [{"role": role, "content": text} for role, text in turns]

    made = []
    for i in range(count):
        row, other = rows[i % len(rows)], rows[(i + 1 + i // len(rows)) % len(rows)]
        asked = row["prompt"].removeprefix("Customer:").removesuffix("\nDesk:")
        sides = {side: answer(row[side], other[side]) for side in ("chosen", "rejected")}
        made.append({"prompt": [{"role": "user", "content": asked}], **sides})
    return made


def narrow_masks(monkeypatch, masks):
    """Has TRL score only marked tokens of each sequence; returns a list to which it adds how many others there are.

    Args:
      masks: marks of tokens by the ids of a sequence.
    """
    collator = importlib.import_module("trl.trainer.dpo_trainer").DataCollatorForPreference
    collate, others = collator.torch_call, []

    def narrowed(self, examples):
        batch = collate(self, examples)
        columns = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        for ids, attended, scored in zip(*columns, strict=True):
            mask = masks[tuple(ids[attended.bool()].tolist())]
            before = int(scored.sum())
            scored[: len(mask)] *= scored.new_tensor(mask)
            others.append(before - int(scored.sum()))
        return batch

    monkeypatch.setattr(collator, "torch_call", narrowed)
    return others


def test_answers_of_several_turns_have_parity_with_trl(tmp_path, inputs, monkeypatch):
    """TRL's DPO has no option for it: its mask of completions is narrowed to what a template marks as generated."""
    inputs = shutil.copytree(inputs, tmp_path / "inputs")
    rows, masks = conversations(read_rows(inputs / "train.jsonl"), PAIRS * 5), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "model")
    for messages in (row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")):
        marked = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        masks[tuple(marked["input_ids"])] = marked["assistant_masks"]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(inputs / "model")
    others = narrow_masks(monkeypatch, masks)
    ours, theirs = curves(tmp_path, inputs, steps=5, chat=rows)
    distance = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"turns: largest difference {distance:.2e}, losses {min(ours):.4f} to {max(ours):.4f}")
    assert min(others) > 0 and distance < 1e-4


def test_every_option_of_trl_is_listed_beside_ours():
    theirs = importlib.import_module("trl")
    parameters = inspect.signature(theirs.DPOTrainer.__init__).parameters.keys() - {"self", "args"}
    options = [field.name for field in dataclasses.fields(theirs.DPOConfig)] + sorted(parameters)
    page = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text()
    assert [name for name in options if name not in trl.OPTIONS or f"\n| `{name}` | " not in page] == []
