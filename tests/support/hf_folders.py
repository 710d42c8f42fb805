"""Small Hugging Face folders with random weights, for tests."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from dpo_jax import trees
from dpo_jax.hf import checkpoints, folders
from dpo_jax.hf.families import FAMILIES
from dpo_jax.hf.tensors import leaf_shapes

LLAMA = dict(
    model_type="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
)
NEOX = dict(
    model_type="gpt_neox",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
CONFIGS = {
    "llama": LLAMA,
    "llama_tied": LLAMA | dict(tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
    "gpt_neox": NEOX,
    "gpt_neox_tied": NEOX | dict(tie_word_embeddings=True, attention_bias=False),
}
# Sizes of larger models.
SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
CONFIG, FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def decoder_config(hf):
    return FAMILIES[hf["model_type"]].decoder_config(hf, "config.json")


def random_leaves(hf, seed=0, dtype="float32"):
    config = decoder_config(hf)
    shapes = leaf_shapes(FAMILIES[hf["model_type"]].tensors(config), config.stacks)
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}


def save(folder, hf=LLAMA, **options):
    """Writes a folder with random weights and returns its leaves by path."""
    leaves = random_leaves(hf)
    checkpoints.save_new(trees.nest(leaves), hf_config=hf, out=folder, options=checkpoints.WriteOptions(**options))
    return leaves


def load(folder, **options):
    config, _ = checkpoints.read_config(folder)
    return trees.flatten(checkpoints.load_params(folder, config, **options))


def edit_weights(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def repeat_head(hf, tensors):
    """Adds the copy of the embedding that a tied model may have as its head."""
    if hf.get("tie_word_embeddings"):
        name, embedding = {
            "llama": ("lm_head.weight", "model.embed_tokens.weight"),
            "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
        }[hf["model_type"]]
        tensors[name] = tensors[embedding]


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype
        assert ours[path].tobytes() == theirs[path].tobytes(), path


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count_reads(monkeypatch):
    """Returns a list to which the size of every later read of weights is appended."""
    sizes = []
    real = folders.read_bytes
    monkeypatch.setattr(folders, "read_bytes", lambda file, at, size: sizes.append(size) or real(file, at, size))
    return sizes
