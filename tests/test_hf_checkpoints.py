"""Hugging Face folders without torch: what is read, and what is refused."""

import json
import re
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from dpo_jax import trees
from dpo_jax.hf import checkpoints, transpose
from dpo_jax.hf.checkpoints import WriteOptions
from dpo_jax.hf.tensors import leaf_shapes, plain
from dpo_jax.models import decoder
from dpo_jax.runtime import reading
from dpo_jax.types import InputError
from tests.support.hf_folders import (
    CONFIG,
    CONFIGS,
    FILE,
    INDEX,
    LLAMA,
    NEOX,
    assert_same,
    decoder_config,
    edit_weights,
    load,
    random_leaves,
    save,
)

both_families = pytest.mark.parametrize("hf", CONFIGS.values(), ids=CONFIGS)


# Reading and writing.


@both_families
def test_table_fills_the_decoders_parameters(hf):
    """The tree that a checkpoint fills is the one that `decoder.init` makes, path for path and shape for shape."""
    config = decoder_config(hf)
    tree = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    assert {path: leaf.shape for path, leaf in trees.flatten(tree).items()} == {
        path: leaf.shape for path, leaf in random_leaves(hf).items()
    }


@both_families
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, hf, dtype):
    leaves = random_leaves(hf, dtype=dtype)
    checkpoints.save_new(trees.nest(leaves), hf_config=hf, out=tmp_path / "m", options=WriteOptions(dtype))
    assert_same(load(tmp_path / "m", dtype=dtype), leaves)


def test_layout_of_linear_maps_follows_torch(tmp_path):
    """Torch computes x @ W.T with W [out, in]; ours contracts x with [in, heads, head_dim]."""
    leaves = save(tmp_path / "m")
    q = load_file(tmp_path / "m" / FILE)["model.layers.1.self_attn.q_proj.weight"]
    x = np.random.default_rng(3).normal(size=16).astype("float32")
    np.testing.assert_allclose(
        (x @ q.T).reshape(4, 6), np.einsum("i,ihd->hd", x, leaves["blocks/attention/q/kernel"][1]), rtol=1e-5, atol=1e-5
    )


def test_fused_query_key_value_is_interleaved_by_head(tmp_path):
    """Rows of GPT-NeoX's tensor go head by head: 4 of q, 4 of k, 4 of v, and then the next head's."""
    leaves = save(tmp_path / "m", NEOX)
    fused = load_file(tmp_path / "m" / FILE)["gpt_neox.layers.2.attention.query_key_value.weight"]
    for offset, letter in enumerate("qkv"):
        ours = leaves[f"blocks/attention/{letter}/kernel"][2]
        for head in range(4):
            start = 12 * head + 4 * offset
            np.testing.assert_array_equal(fused[start : start + 4], ours[:, head].T)


def test_place_gets_every_leaf_and_its_result_is_kept(tmp_path):
    leaves = save(tmp_path / "m")
    seen = load(
        tmp_path / "m", place=lambda path, shape, read: (path, shape, checkpoints.whole(path, shape, read).sum())
    )
    assert seen == {path: (path, leaf.shape, leaf.sum()) for path, leaf in leaves.items()}


def test_host_holds_one_leaf_while_loading_and_one_tensor_while_exporting(tmp_path, monkeypatch):
    """12 MB of weights; the largest stacked leaf has 2 MB, the largest tensor 0.13 MB."""
    # Threads hold a piece and a tile each, a fixed size that would be all of this model.
    monkeypatch.setattr(reading, "PIECE", 16 << 10)
    monkeypatch.setattr(transpose, "TILE", (16, 32))
    monkeypatch.setattr(transpose, "THREADS", 2)
    tqdm.get_lock()  # what shows progress imports modules when it is first needed
    hf = LLAMA | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=16, head_dim=32, num_key_value_heads=4)
    leaves = save(tmp_path / "m", hf)
    total, largest = sum(x.nbytes for x in leaves.values()), max(x.nbytes for x in leaves.values())
    config, _ = checkpoints.read_config(tmp_path / "m")
    checkpoints.load_params(tmp_path / "m", config)  # Python keeps some tuples to use again, and gets them here
    tracemalloc.start()
    checkpoints.load_params(tmp_path / "m", config, place=lambda *leaf: checkpoints.whole(*leaf) is None)
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    checkpoints.export(trees.nest(leaves), base=tmp_path / "m", out=tmp_path / "out")
    exporting = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loading < 1.5 * largest < total / 3
    assert exporting < 0.4 * largest


# Shards.


def test_shards_read_like_one_file_and_have_an_index(tmp_path):
    leaves = save(tmp_path / "m", max_shard_bytes=4000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and set(files) == set(index["weight_map"].values())
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves.values())
    assert all(name in load_file(tmp_path / "m" / file) for name, file in index["weight_map"].items())
    assert_same(load(tmp_path / "m"), leaves)


def test_index_that_names_an_absent_file_is_refused(tmp_path):
    save(tmp_path / "m", max_shard_bytes=4000)
    second = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(InputError, match=f"not in the folder: {second.name};"):
        load(tmp_path / "m")


def test_index_cannot_reach_outside_its_folder(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / FILE).rename(tmp_path / "weights.safetensors")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../weights.safetensors"}}))
    with pytest.raises(InputError, match=r"\.\./weights"):
        load(tmp_path / "m")


def test_tensor_in_two_shards_is_refused(tmp_path):
    save(tmp_path / "m")
    shutil.copy(tmp_path / "m" / FILE, tmp_path / "m" / "b.safetensors")
    (tmp_path / "m" / FILE).rename(tmp_path / "m" / "a.safetensors")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(InputError, match="b.safetensors.*again"):
        load(tmp_path / "m")


# Checkpoints that do not fit.


def test_every_missing_unexpected_and_misshapen_tensor_is_named_at_once(tmp_path):
    save(tmp_path / "m")

    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((24, 16), "float32")
        tensors["model.norm.weight"] = np.zeros(15, "float32")
        tensors["lm_head.weight"] = np.zeros((40, 16), "int8")

    edit_weights(tmp_path / "m", spoil)
    with pytest.raises(InputError) as error:
        load(tmp_path / "m")
    assert error.value.got.split("; ") == [
        "missing model.layers.1.mlp.up_proj.weight [24, 16]",
        "lm_head.weight is I8, not one of F64, F32, BF16, F16",
        "model.norm.weight is [15], not [16]",
        "unexpected model.layers.3.mlp.up_proj.weight [24, 16]",
    ]


def test_long_lists_of_problems_are_cut_and_counted(tmp_path):
    save(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({f"extra.{i}": np.zeros(1, "f4") for i in range(25)}))
    with pytest.raises(InputError) as error:
        load(tmp_path / "m")
    assert error.value.got.count("unexpected") == 5 and error.value.got.endswith("and 20 more")


LORA = {f"model.layers.0.self_attn.q_proj.lora_{side}.default.weight": np.zeros((2, 2), "f4") for side in "AB"}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda k: f"_orig_mod.{k}", "51 names have _orig_mod. .of torch.compile. in them, such as _orig_mod.lm_head"),
        (
            lambda k: f"module._orig_mod.{k}",
            r"_orig_mod. .* and module. .*k.replace\('_orig_mod.', ''\).replace\('module.'",
        ),
        (lambda k: k.replace("mlp", "_fsdp_wrapped_module.mlp"), "18 names have _fsdp_wrapped_module. .of FSDP"),
        (lambda k: k.replace("q_proj.w", "q_proj.base_layer.w"), "3 names have base_layer. .of PEFT"),
        (lambda k: f"base_model.model.{k}", "51 names have base_model.model. .of PEFT"),
        (lambda k: f"model.{k}", r"51 names have model. before them.*k.removeprefix\('model.'\)"),
        (lambda k: f"language_model.{k}", "51 names have language_model. before them, such as language_model.lm_head"),
        (lambda k: k.removeprefix("model."), "50 names lack model. before them, such as embed_tokens"),
        (lambda k: "_fsdp_wrapped_module._flat_param", "FSDP has flattened the tensors .*FULL_STATE_DICT"),
    ],
)
def test_names_that_a_wrapper_changed_are_one_line_with_the_wrapper(tmp_path, change, said):
    save(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / FILE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, tmp_path / "m" / FILE)
    with pytest.raises(InputError, match=said) as error:
        load(tmp_path / "m")
    assert "missing" not in error.value.got and "unexpected" not in error.value.got
    code = re.search(r"save_file\((.*), f, ", error.value.remedy)
    if code:  # the remedy makes names with which the folder is read
        renamed = eval(code[1], {"load_file": load_file, "f": tmp_path / "m" / FILE})
        save_file(renamed, tmp_path / "m" / FILE, {"format": "pt"})
        load(tmp_path / "m")


def test_faults_that_renaming_leaves_are_named_too(tmp_path):
    save(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / FILE)
    del tensors["lm_head.weight"]
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"x": np.zeros(2, "f4")}, tmp_path / "m" / FILE)
    with pytest.raises(InputError) as error:
        load(tmp_path / "m")
    assert error.value.got.split("; ")[1:] == ["missing lm_head.weight [40, 16]", "unexpected x [2]"]


def test_empty_tensors_and_unmerged_adapters_are_told_with_their_cause(tmp_path):
    save(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / FILE)
    empty = {name: np.zeros(0, "f4") if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(empty, tmp_path / "m" / FILE)
    with pytest.raises(InputError, match="42 tensors, such as .*, are empty, .* ZeRO-3.*zero_to_fp32.py") as error:
        load(tmp_path / "m")
    assert "is [0]" not in error.value.got
    save_file(tensors | LORA, tmp_path / "m" / FILE)
    with pytest.raises(InputError, match="adapter that was not merged;.*merge_and_unload") as error:
        load(tmp_path / "m")
    assert "unexpected" not in error.value.got


@pytest.mark.parametrize(
    "hf, names",
    [
        (LLAMA, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        (
            NEOX,
            [
                "gpt_neox.layers.2.attention.bias",
                "gpt_neox.layers.2.attention.masked_bias",
                "gpt_neox.layers.2.attention.rotary_emb.inv_freq",
            ],
        ),
    ],
    ids=["llama", "gpt_neox"],
)
def test_buffers_of_old_checkpoints_are_skipped(tmp_path, hf, names):
    """Of any type (the causal mask is boolean); no others are, and they change no digest."""
    leaves = save(tmp_path / "m", hf)
    before = checkpoints.digest(tmp_path / "m")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({name: np.ones(3, "bool") for name in names}))
    assert_same(load(tmp_path / "m"), leaves)
    assert checkpoints.digest(tmp_path / "m") == before
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({names[0] + "x": np.ones(3, "bool")}))
    with pytest.raises(InputError, match="unexpected.*x "):
        load(tmp_path / "m")


def test_head_of_gpt_neox_goes_by_two_names(tmp_path):
    """A checkpoint's own name is kept on export."""
    leaves = save(tmp_path / "m", NEOX)
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": tensors.pop("embed_out.weight")}))
    assert_same(load(tmp_path / "m"), leaves)
    checkpoints.export(trees.nest(leaves), base=tmp_path / "m", out=tmp_path / "out")
    assert "lm_head.weight" in load_file(tmp_path / "out" / FILE)
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"embed_out.weight": tensors["lm_head.weight"]}))
    with pytest.raises(InputError, match="unexpected lm_head.weight"):
        load(tmp_path / "m")


def test_tied_checkpoint_may_repeat_its_head_but_not_change_it(tmp_path):
    leaves = save(tmp_path / "m", CONFIGS["llama_tied"])
    embedding = leaves["embed/embedding"]
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert_same(load(tmp_path / "m"), leaves)
    # An export writes it again, and writes what the embedding has become.
    leaves["embed/embedding"] = embedding + 1
    checkpoints.export(trees.nest(leaves), base=tmp_path / "m", out=tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / FILE)["lm_head.weight"], embedding + 1)
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(InputError, match="lm_head.weight: differs from model.embed_tokens.weight"):
        load(tmp_path / "m")


def test_changed_row_of_a_repeated_head_is_found_by_who_reads_it(tmp_path):
    """Hosts that read other rows of the embedding need not read that one."""
    leaves = save(tmp_path / "m", CONFIGS["llama_tied"])
    head = leaves["embed/embedding"].copy()
    head[30, 5] += 1
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": head}))
    half = lambda rows: lambda path, shape, read: read((rows if path == "embed/embedding" else slice(None),))
    load(tmp_path / "m", place=half(slice(0, 20)))
    with pytest.raises(InputError, match="lm_head.weight: differs"):
        load(tmp_path / "m", place=half(slice(20, 40)))


@pytest.mark.parametrize(
    "name, said",
    [
        ("pytorch_model.bin", "names, but pytorch_model.bin; .*never read.*convert: Auto"),
        ("model.gguf", "names, but model.gguf; .*gguf_file=NAME"),
        ("consolidated.safetensors", "names, but consolidated.safetensors; .*Rename"),
        (None, "no weights; .*Download the model again"),
    ],
)
def test_weights_of_another_format_or_name_are_told(tmp_path, name, said):
    save(tmp_path / "m")
    file = (tmp_path / "m" / FILE).rename(tmp_path / "elsewhere")
    if name:
        file.rename(tmp_path / "m" / name)
    with pytest.raises(InputError, match=said):
        load(tmp_path / "m")


def test_damaged_file_is_refused(tmp_path):
    save(tmp_path / "m")
    whole = (tmp_path / "m" / FILE).read_bytes()
    (tmp_path / "m" / FILE).write_bytes(whole[:-8])
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "m")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": None}}])
def test_index_that_names_no_files_is_refused(tmp_path, index):
    save(tmp_path / "m")
    (tmp_path / "m" / FILE).unlink()
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="names no files|not in the folder: None"):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", [FILE, CONFIG])
def test_file_that_cannot_be_opened_is_refused(tmp_path, name):
    save(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).mkdir()  # as a file without permission is to root
    with pytest.raises(InputError, match="cannot be read|no weights"):
        load(tmp_path / "m")


def test_unknown_dtypes_are_refused(tmp_path):
    leaves = save(tmp_path / "m")
    for act in (
        lambda: load(tmp_path / "m", dtype="float8"),
        lambda: checkpoints.export(
            trees.nest(leaves), base=tmp_path / "m", out=tmp_path / "out", options=WriteOptions("int8")
        ),
        lambda: save(tmp_path / "out", dtype="int8"),
    ):
        with pytest.raises(InputError, match="float32, bfloat16, float16"):
            act()


# Finding folders.


def test_local_folder_resolves_to_itself(tmp_path):
    assert checkpoints.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "owner/name/extra"])
def test_path_that_is_no_folder_is_refused_without_asking_the_hub(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match="no such folder; expected"):
        checkpoints.resolve(path)


def test_hub_error_becomes_an_input_error():
    """Offline, as all tests are."""
    with pytest.raises(InputError, match="the Hub answered"):
        checkpoints.resolve("dpo-jax-tests/no-such-model")


def test_hub_id_downloads_no_pickles_and_no_code(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoints.resolve("owner/name") == tmp_path
    files = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "additional_chat_templates/tools.jinja",
    ]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "original/consolidated.00.pth", "onnx/model.onnx", "a.gguf"]
    assert list(filter_repo_objects(files + unwanted, allow_patterns=asked["owner/name"])) == files


def test_table_with_a_name_or_leaf_twice_is_a_bug():
    one = plain("a.weight", "a", (2,))
    for other in (plain("a.weight", "b", (2,)), plain("b.weight", "a", (2,))):
        with pytest.raises(AssertionError):
            leaf_shapes([one, other], {"layer": 1})


def test_adapter_in_place_of_a_model_names_both_fields(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(
        InputError, match=f"adapter without its model.*--config.lora.path={tmp_path} --config.model.path=owner/name"
    ):
        checkpoints.read_config(tmp_path)
