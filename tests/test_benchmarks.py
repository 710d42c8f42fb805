"""What the benchmarks make of their numbers, on made-up ones; that they start; and one short run against TRL."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import common, host_memory, layouts, loading, memory, scaling, startup, vs_trl, vs_tunix
from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.types import Encoded
from tests.support.runs import make_inputs

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    "vs_trl",
    "vs_tunix",
    "layouts",
    "scaling",
    "memory",
    "startup",
    "host_memory",
    "loading",
    "divergence",
    "kills",
)


def a_round(times, *, losses=(0.7, 0.6, 0.5, 0.4), positions=10, peak=100, **more):
    steps = len(losses)
    of_step = {"positions": [positions] * steps, "reference_positions": [0] * steps, "tokens": [5] * steps}
    return {"losses": list(losses), "step_times_s": times, "peak_bytes": peak, "faults_per_step": 3.0} | of_step | more


# --- shared -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_shows_its_help(script, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m benchmarks.{script}" in shown and "--out" in shown


def test_median_time_leaves_the_warm_up_of_every_round_out():
    assert common.median_time([a_round([90, 80, 1, 2]), a_round([70, 60, 3])]) == 2


def test_median_of_skips_rounds_that_do_not_have_the_number():
    assert common.median_of([{"a": 1}, {"a": None}, {}, {"a": 3}], "a") == 2
    assert common.median_of([{}], "a") is None


def test_ratio_of_what_is_missing_is_missing():
    assert common.ratio(6, 3) == 2
    assert common.ratio(None, 3) is common.ratio(6, None) is common.ratio(6, 0) is None


def test_table_aligns_columns_and_shows_what_is_missing():
    rows = [{"side": "a", "pairs/s": 1.23456, "bytes": 1234567}, {"side": "long name", "pairs/s": None}]
    assert common.table(rows).splitlines() == [
        "side       pairs/s      bytes",
        "a            1.235  1,234,567",
        "long name        -          -",
    ]


def test_faults_per_step_counts_from_the_end_of_the_warm_up():
    samples = [common.Sample(rows, faults, 0, 0) for rows, faults in [(1, 900), (2, 1000), (3, 1010), (5, 1060)]]
    assert common.faults_per_step(samples) == 20
    assert common.faults_per_step(samples[:2]) is None


def test_watch_samples_once_for_every_size_of_the_file(tmp_path):
    path = tmp_path / "rows"
    with common.watch(path, every_s=0.001) as samples:
        for count in (1, 2):
            path.write_text("x\n" * count)
            while not samples or samples[-1].rows < count:
                pass
    assert [sample.rows for sample in samples] == [1, 2]
    assert samples[0].rss_bytes >= samples[0].anonymous_bytes > 0


def test_fresh_process_reports_its_own_peak_and_why_it_failed(tmp_path):
    ballast = np.ones(2**26)  # 512 MiB, which the other process must not count
    found = common.in_fresh_process("tests.support.fresh:allocator_settings", tmp_path / "a", {}, allocator="tuned")
    assert found["environment"]["MALLOC_MMAP_THRESHOLD_"] == str(2**33)
    assert found["peak_bytes"] < common.memory("VmHWM") - ballast.nbytes / 2
    assert common.in_fresh_process("tests.support.fresh:no_such", tmp_path / "b", {}) == {"failed": "exit status 1"}


def test_pairs_come_again_in_order_where_there_are_too_few(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", train_pairs=3)
    out = tmp_path / "pairs.jsonl"
    assert common.write_pairs(str(inputs / "train.jsonl"), out, inputs / "model", count=7, max_length=128) == 3
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert prompts[:3] == prompts[3:6] and prompts[6] == prompts[0] and len(set(prompts)) == 3


def test_selected_pairs_keep_to_every_limit(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", train_pairs=30)
    source, tokenizer = str(inputs / "train.jsonl"), inputs / "model"
    every = [tuple(map(len, pair.ids)) for pair in common.read_pairs(source, tokenizer)]
    prompt, answer = int(np.median([each[0] for each in every])), max(every[0][1:])
    limits = dict(max_prompt=prompt, max_answer=answer, max_length=prompt + answer - 1)
    kept = [tuple(map(len, pair.ids)) for pair in common.select_pairs(source, tokenizer, count=100, **limits)]
    assert kept == [
        each
        for each in every
        if each[0] <= prompt and max(each[1:]) <= answer and each[0] + max(each[1:]) < prompt + answer
    ]
    assert 0 < len(kept) < len(every)


# --- vs_trl -------------------------------------------------------------------------------------------------------


def test_trl_comparison_takes_speed_from_the_tuned_and_memory_from_the_plain_allocator():
    ours = {"default": [a_round([9, 9, 1, 1])], "tuned": [a_round([9, 9, 2, 2], peak=70)]}
    theirs = {
        "default": [a_round([9, 9, 8, 8], positions=40, peak=400, losses=(0.7, 0.6, 0.5, 0.1))],
        "tuned": [a_round([9, 9, 4, 4], positions=40, peak=900)],
    }
    found = vs_trl.compare({"dpo_jax": ours, "trl-float32": theirs}, pairs=8)
    assert found["sides"]["dpo_jax"]["default"]["pairs_per_s"] == 8
    assert found["ratios"]["trl-float32"] == {"pairs_per_s": 4, "peak_bytes": 0.25, "positions": 0.25}
    assert found["ratios"]["dpo_jax"] == {"time, allocator as it is to tuned": 0.5}
    difference = found["loss_difference"]["trl-float32"]
    assert difference["all 4 steps"] == pytest.approx(0.3)
    assert len(vs_trl.rows_of(found)) == 4 and common.table(vs_trl.rows_of(found))


def test_trl_comparison_counts_the_steps_that_all_sides_made():
    ours = {"default": [a_round([9, 9, 1, 1])]}
    theirs = {"default": [a_round([9, 9, 1], losses=(0.7, 0.6, 0.4))]}
    found = vs_trl.compare({"dpo_jax": ours, "trl-float32": theirs}, pairs=8)
    assert [found["sides"][side]["default"]["positions"] for side in found["sides"]] == [30, 30]
    assert found["loss_difference"]["trl-float32"]["all 3 steps"] == pytest.approx(0.1)


def test_trl_comparison_shows_a_side_that_failed():
    results = {"dpo_jax": {"default": [a_round([9, 9, 1, 1])]}, "trl": {"default": [{"failed": "exit status -9"}]}}
    found = vs_trl.compare(results, pairs=8)
    assert found["sides"]["trl"]["default"] == {"failed": "exit status -9"}
    assert found["ratios"]["trl"]["peak_bytes"] is None
    assert "exit status -9" in common.table(vs_trl.rows_of(found))


def test_reference_comparison_gives_the_largest_distance_of_log_probs():
    def scored(seconds, logps):
        return {"default": [{"seconds": seconds, "faults": 1, "peak_bytes": 8, "positions": 4, "logps": logps}]}

    results = {"dpo_jax": scored(2.0, [[-1, -2], [-3, -4]]), "trl-float32": scored(8.0, [[-1, -2.5], [-3, -4]])}
    results["trl-float32"]["tuned"] = results["trl-float32"]["default"]
    found = vs_trl.compare_reference(results, pairs=16)
    assert found["sides"]["dpo_jax"]["default"]["pairs_per_s"] == 8
    assert found["ratios"]["trl-float32"] == {"pairs_per_s": 4, "peak_bytes": 1, "positions": 1}
    assert found["logps_difference"] == {"trl-float32": 0.5}
    assert len(vs_trl.rows_of(found)) == 3


# --- the others ---------------------------------------------------------------------------------------------------


def test_padding_for_tunix_is_left_of_prompts_and_right_of_answers():
    ids = [np.array([5, 6]), np.array([7])]
    tokens, mask = vs_tunix.pad(ids, 3, left=True)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 7]] and mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    tokens, mask = vs_tunix.pad(ids, 3, left=False)
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0]] and mask.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_tunix_comparison_gives_ratios_of_each_allocator():
    ours, theirs = [a_round([9, 9, 1, 1])], [a_round([9, 9, 4, 4], positions=20, peak=200, losses=(0.7, 0.6, 0.5, 0.3))]
    found = vs_tunix.compare({"dpo_jax": {"default": ours}, "tunix": {"default": theirs}}, pairs=8)
    assert found["ratios"] == {"default": {"pairs_per_s": 4, "peak_bytes": 0.5, "positions": 0.5}}
    assert found["loss_difference"]["default"] == pytest.approx(0.1)


PAIRS = [
    Encoded(np.array([11, 12, 13]), np.array([21, 22]), np.array([31])),
    Encoded(np.array([14]), np.array([23]), np.array([32, 33])),
]


def test_padded_batch_has_a_completion_a_row_and_the_length_of_the_longest():
    batch = layouts.padded_batch(PAIRS, np.zeros((2, 2)), None)
    assert batch.rows.tokens.tolist() == [
        [[11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [14, 23, 0, 0, 0], [14, 32, 33, 0, 0]]
    ]
    assert batch.rows.key_start[0, 1].tolist() == [0, 0, 0, 0, 4]
    assert batch.rows.source[0].tolist() == [[2, 3], [2, 0], [0, 0], [0, 1]]
    assert batch.rows.target[0].tolist() == [[21, 22], [31, 0], [23, 0], [32, 33]]
    assert batch.rows.slot[0].tolist() == [[0, 0], [1, -1], [2, -1], [3, 3]]
    assert batch.present.tolist() == [[True, True]] and batch.lengths.tolist() == [[2, 1], [1, 2]]


@pytest.mark.slow
def test_padded_batch_scores_as_the_packed_one_does():
    import jax

    from dpo_jax.data.layout import collate
    from dpo_jax.data.packing import choose_shape
    from dpo_jax.models import decoder
    from dpo_jax.models.config import DecoderConfig
    from dpo_jax.scoring import make_logps_fn
    from dpo_jax.steps import make_score_step

    lengths = np.array([pair.lengths for pair in PAIRS])
    shape = choose_shape(lengths, layout="shared", pairs=2, row_length=None, rows=1, shards=1, target_positions=128)
    assert not shape.crops
    batches = [collate(PAIRS, None, shape)]
    batches += [layouts.padded_batch(PAIRS, np.zeros((2, 2)), target) for target in (None, 1)]
    assert [batch.rows.tokens.shape for batch in batches[1:]] == [(1, 4, 5), (2, 2, 5)]
    model = DecoderConfig(
        vocab_size=40, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=32, max_positions=64
    )
    params = decoder.init(jax.random.key(0), model)
    score = jax.jit(make_score_step(make_logps_fn(model, pairs=2), has_aux=True))
    packed, padded = (np.asarray(score(params, batch)[0]) for batch in (batches[0], batches[2]))
    assert np.all(packed < 0)
    np.testing.assert_allclose(padded, packed, rtol=1e-5)


def test_layouts_comparison_is_relative_to_shared_and_of_the_reference_inside_to_precomputed():
    def in_memory(total):
        return {"memory": {"total_bytes": total, "temp_bytes": 1}, "step_peak_bytes": total + 1}

    results = {
        "shared": [a_round([9, 9, 1, 1])],
        "padded": [a_round([9, 9, 3, 3], positions=40)],
        "precomputed": [a_round([9, 9, 1, 1], **in_memory(9))],
        "in-step": [a_round([9, 9, 2, 2], **in_memory(19))],
    }
    found = layouts.compare(results, 8, [10, 12])
    assert found["ratios_to_shared"] == {"padded": {"step_s": 3, "positions": 4, "peak_bytes": 1}}
    inside = {"step_peak_bytes": 2, "compiler_total_bytes": pytest.approx(19 / 9), "step_s": 2}
    assert found["in_step_to_precomputed"] == inside
    assert found["loss_difference"]["padded"] == 0


def test_scaling_copies_are_different_pairs_with_reference_values(tmp_path):
    scaling.write_copies([{"prompt": "p", "chosen": "c", "rejected": "r"}], tmp_path / "rows", 3)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["0000000p", "0000001p", "0000002p"]
    assert rows[0]["ref_chosen_logps"] == rows[0]["ref_rejected_logps"] == -50


def test_scaling_comparison_gives_growth_and_ratios():
    def trained(seconds, end):
        sizes = dict(rss_start_bytes=100, rss_end_bytes=end, anonymous_start_bytes=50, anonymous_end_bytes=60)
        return [{"step_times_s": [9, 9, seconds], "peak_bytes": 200, "data_wait_s": 0.1, "positions": 1} | sizes]

    read = {size: [{"seconds": size / 100, "peak_bytes": 300}] for size in (100, 1000)}
    found = scaling.compare(read, {100: trained(1, 110), 1000: trained(2, 220)}, pairs=8)
    assert [row["seconds_per_pair"] for row in found["sizes"]] == [0.125, 0.25]
    assert [row["rss_growth_bytes"] for row in found["sizes"]] == [10, 120]
    ratios = found["ratios_of_largest_to_smallest"]
    assert ratios["seconds_per_pair"] == ratios["rss_end_bytes"] == 2 and ratios["tokenize_s"] == 10


def test_vocabulary_growth_is_counted_in_matrices():
    def account(size, total, temp):
        return {"total_bytes": total, "temp_bytes": temp, "matrix_bytes": 4 * size, "matrices": 2}

    # Per token of the vocabulary: two matrices of 4 * 4 bytes each subtracted, and 4 bytes, one matrix, left besides.
    sizes = {"10": account(10, 1000 + 36 * 10, 500 + 12 * 10), "40": account(40, 1000 + 36 * 40, 500 + 12 * 40)}
    found = memory.without_vocabulary(sizes)
    assert [one["rest_bytes"] for one in found["vocabularies"].values()] == [1040, 1160]
    assert found["rest_ratio"] == 1160 / 1040
    assert found["rest_growth_in_matrices"] == 1 and found["temp_growth_in_matrices"] == 3


def test_policies_are_compared_to_none_and_may_fail():
    def ran(temp, seconds):
        account = {"temp_bytes": temp, "total_bytes": temp}
        return [{"step_times_s": [9, 9, seconds], "step_peak_bytes": 5, "memory": account}]

    results = {"none": ran(100, 1), "block": ran(40, 2), "offload": [{"failed": "no such memory"}]}
    found = memory.compare_policies(results)
    assert found["block"]["temp_bytes_ratio"] == 0.4 and found["block"]["step_s_ratio"] == 2
    assert found["offload"] == {"failed": "no such memory", "temp_bytes_ratio": None, "step_s_ratio": None}


def test_parts_of_a_start_are_read_from_what_train_says():
    watch = Stopwatch(0.8)
    watch.parts |= {"digest of weights": 0.1, "compile": 78.3}
    found = startup.parts_of(f"first update done after {watch}")
    assert found is not None and found == {"start": 0.8, "digest of weights": 0.1, "compile": 78, "all": 0.8}
    assert startup.parts_of("compiled update in 18.5 s") is None
    again = startup.compare(found | {"all": 21.8}, found | {"compile": 15.6, "all": 10.9})
    assert again["compile_ratio"] == pytest.approx(5) and again["ratio"] == pytest.approx(2)


def test_loading_comparison_is_of_medians_and_names_what_is_too_slow():
    def rounds(*seconds):
        counts = {"reads": 3, "read_bytes": 2**20, "writes": 0, "written_bytes": 0}
        return [{"seconds": each, "cpu_s": 2 * each} | counts for each in seconds]

    results = {"read": rounds(6, 9, 1), "load_file": rounds(4), "load": rounds(8, 99, 8), "export": rounds(10)}
    found = loading.compare(results | {"write": rounds(9)}, total=2**30)
    assert found["ratios"] == {"load": {"read": 0.75, "load_file": 0.5}, "export": {"write": 0.9}}
    assert found["sides"]["read"]["bytes_per_s"] == 2**30 / 6 and found["sides"]["read"]["cpu_s"] == 12
    assert loading.below(found["ratios"]) == ["load has 0.5 of the speed of load_file"]
    rows = {row["side"]: row for row in loading.rows_of(found)}
    assert rows["load"]["of read/write"] == 0.75 and rows["load"]["of safetensors"] == 0.5
    assert rows["export"]["of read/write"] == 0.9 and rows["read"]["MiB read"] == 1
    assert rows["export"]["CPU of read/write"] == 0.9


def test_bytes_read_again_are_those_that_reads_of_a_file_share():
    reads = [("a", 0, 10), ("b", 5, 5), ("a", 10, 10), ("a", 5, 8), ("a", 19, 1)]
    assert loading.read_again(reads[:3]) == 0
    assert loading.read_again(reads) == 8 + 1


@pytest.mark.parametrize("family", loading.FAMILIES)
def test_loading_and_exporting_move_every_byte_once(tmp_path, family):
    """Sides in this process, on a model of so wide heads that nothing is read across gaps."""
    about = loading.FAMILIES[family]
    small = dict(vocab_size=64, num_attention_heads=1, num_key_value_heads=1)
    shape = {name: small.get(name, value) for name, value in about["shape"].items()}
    made: dict[str, Any] = about | {"shape": shape}
    host_memory.write_checkpoint(tmp_path / "model", width=512, target_bytes=12 * 2**20, **made)
    args = types.SimpleNamespace(model=str(tmp_path / "model"), fsync=True, total=0)
    paths = loading.weight_files(args)
    args.total = sum(path.stat().st_size for path in paths)
    found = {}
    for side in ("read", "load", "write", "export"):
        (tmp_path / side).mkdir()
        found[side] = getattr(loading, side)(tmp_path / side, args)
    assert len(paths) > 4 and found["read"]["read_bytes"] >= args.total
    assert found["load"]["read_again_bytes"] == 0
    assert args.total <= found["load"]["read_bytes"] < 1.05 * args.total  # headers are read by the library, too
    for side in ("write", "export"):
        assert 0.99 * args.total < found[side]["size_bytes"] <= found[side]["written_bytes"] < 1.01 * args.total


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_steps_against_trl_from_end_to_end(tmp_path):
    pytest.importorskip("torch", reason="the benchmark makes its checkpoint with it")
    pytest.importorskip("trl", reason="the other side of the benchmark")
    inputs = make_inputs(tmp_path / "inputs", train_pairs=12)
    options = {"data": inputs / "train.jsonl", "model": inputs / "model", "pairs": 4, "steps": 3, "max_length": 128}
    options |= {"sides": "dpo_jax,trl-float32,trl-answers,trl-precomputed", "allocators": "default"}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.vs_trl", f"--out={out}", *(f"--{k}={v}" for k, v in options.items())]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "dpo_jax to trl-float32: pairs_per_s" in shown
    found = types.SimpleNamespace(**json.loads((out / "result.json").read_text()))
    assert found.steps_compared == 3 and set(found.loss_difference) == {"trl-float32", "trl-answers", "trl-precomputed"}
    assert all(each["all 3 steps"] < 1e-4 for each in found.loss_difference.values())
    trl = found.sides["trl-float32"]["default"]
    assert trl["positions"] == trl["reference_positions_in_step"] > trl["tokens"] > 0
