"""Plans: topologies, what is drawn in place of data, what is counted, and the lines and status that scripts rely on."""

import dataclasses
import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from dpo_jax import cli, flags
from dpo_jax.cost import chips, flops, roofline
from dpo_jax.data.packing import Shape, unit_lengths
from dpo_jax.losses import make_loss
from dpo_jax.plan import estimate
from dpo_jax.plan.command import DOES_NOT_FIT, SWEPT_REMAT, show, sweep, verdict
from dpo_jax.plan.topology import devices_of, parse_topology
from dpo_jax.types import InputError

ROOT = Path(__file__).parents[1]
MIXTRAL = "configs/architectures/mixtral_8x7b.json"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe(name, *overrides):
    return flags.load(f"configs/{name}.py", overrides)


@pytest.mark.parametrize(
    "text, count", [("v5p:4x4x4", 64), ("v5e:16x16,slices=2", 512), ("h100:64", 64), ("v6e:8x8", 64)]
)
def test_topology_is_read_from_its_name(text, count):
    assert parse_topology(text).count == count


def test_type_of_google_cloud_is_planned_for_by_its_shape():
    assert str(parse_topology("v5litepod-16,slices=2")) == "2 x v5e:4x4"
    assert parse_topology("v5p-128") == parse_topology("v5p:4x4x4")


@pytest.mark.parametrize(
    "text", ["v5p", "v5p:4x4", "v9:4x4", "v5p:4x4x4,slices=0", "v5p:4x4x4,hosts=2", "v5e:32x32", "h100:8x8", ""]
)
def test_topology_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="--topology"):
        parse_topology(text)


def test_drawn_lengths_keep_the_limits_of_the_data_and_reach_them():
    chosen = recipe("llama3_8b")
    lengths = estimate.drawn_lengths(chosen)
    assert len(lengths) == estimate.DRAWN_PAIRS and lengths.min() >= 1
    assert (lengths[:, :1] + lengths[:, 1:]).max() == 2048 and lengths[:, 0].max() == 1024
    medians = np.median(lengths, axis=0)
    assert np.allclose(medians, [120, 240, 240], rtol=0.1)


def test_architecture_is_read_without_weights_and_missing_ones_are_named(tmp_path):
    assert estimate.architecture(recipe("llama3_8b")).width == 4096
    with pytest.raises(InputError, match="config.plan.architecture"):
        estimate.architecture(recipe("llama3_8b", f"plan.architecture={tmp_path}/none.json"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine with one model, of which it gives the config.json alone, and a list of what is asked."""
    asked = []
    text = Path("configs/architectures/llama3_8b.json").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            if "/some-lab/" in self.path:  # and not what huggingface_hub asks for itself
                asked.append(f"{self.command} {self.path}")
            status, error = 200, None
            if self.path != "/some-lab/model/resolve/main/config.json":
                status, error = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
            self.send_response(status)
            for name, value in {"X-Error-Code": error, "X-Repo-Commit": "0" * 40, "ETag": '"1"'}.items():
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()

        def do_GET(self):  # noqa: N802
            self.do_HEAD()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield asked
    server.shutdown()
    server.server_close()


def test_plan_of_a_model_on_the_hub_fetches_its_config_alone(hub):
    chosen = recipe("llama3_8b", "plan.architecture=", "model.path=some-lab/model")
    assert estimate.architecture(chosen) == estimate.architecture(recipe("llama3_8b"))
    assert estimate.selected(chosen, estimate.architecture(chosen)).adapters is None
    path = "/some-lab/model/resolve/main/config.json"
    assert hub == [f"HEAD {path}", f"GET {path}"]  # once, and no other file


@pytest.mark.parametrize(
    "path, words",
    [
        ("some-lab/none", "'some-lab/none', no such folder, and the Hub answered: there is no such model"),
        ("some-lab/gated", "and the Hub answered: the model is gated, and not open to this token; expected"),
        ("configs", "'configs', no folder with a config.json"),
    ],
)
def test_plan_of_a_model_that_is_not_there_says_so_in_one_line(hub, path, words):
    with pytest.raises(InputError) as refused:
        estimate.architecture(recipe("llama3_8b", "plan.architecture=", f"model.path={path}"))
    assert words in str(refused.value) and "Client Error" not in str(refused.value)


def test_work_and_flops_of_an_update_in_closed_form():
    # Every batch is the same: 8 pairs of 100 + 2 * 51 tokens, of which two stand in a row of 512.
    model = estimate.architecture(recipe("llama3_8b"))
    lengths, shape = np.tile([[100, 51, 51]], (32, 1)), Shape(8, 2, 512, 4, "shared")
    work = roofline.mean_work(model, lengths, shape)
    assert (work.microbatches, work.positions) == (2, 2 * 2 * 512)
    assert work.tokens == 8 * 200 and work.scored == 8 * 102
    block = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    head = 2 * 128256 * 4096 * 8 * 102
    padding = 2 * 32 * block * (2048 - 1600)
    assert work.head == head and work.padding == padding
    assert work.needed == flops.forward_flops(model, lengths[:8], "shared")
    blocks = work.needed - head + padding
    assert roofline.update_flops(work, "dots") == 3 * blocks + 4 * head
    assert roofline.update_flops(work, "block") == 4 * blocks + 4 * head


def test_network_bytes_of_a_gpu_mesh_in_closed_form():
    model = estimate.architecture(recipe("llama3_8b"))
    work = roofline.Work(8, 2.0, 4096.0, 4000.0, 800.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    held = roofline.ChipBytes(weights=1e9, trained=1e9)

    def sent(**sizes):
        return roofline.network_bytes(model, work, roofline.Execution(sizes, 2), held, per_host=8, backward=True)

    one_host = sent(replica=1, fsdp=8, tensor=1)
    # Two microbatches: weights twice in two bytes, gradients once in four.
    assert one_host.within == pytest.approx(2 * (2e9 + 2e9) * 7 / 8) and one_host.across == 0
    two_hosts = sent(replica=1, fsdp=16, tensor=1)
    assert two_hosts.across == pytest.approx(2 * (2e9 + 2e9) / 2 / 8)
    whole = sent(replica=1, fsdp=1, tensor=8)
    assert whole.within == pytest.approx(2 * 4096 * 4096 * 2 * 32 * 2 * 2 * 7 / 8)


def test_gradients_of_what_trains_alone_are_scattered_and_held():
    model = estimate.architecture(recipe("llama3_8b"))
    work = roofline.Work(8, 2.0, 4096.0, 4000.0, 800.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    execution = roofline.Execution(dict(replica=2, fsdp=8, tensor=1), itemsize=2)
    held = roofline.ChipBytes(weights=1e9, trained=1e8)
    some = roofline.network_bytes(model, work, execution, held, per_host=8, backward=True)
    # Two microbatches: weights twice in two bytes, a tenth's gradients once in four; those then over the two replicas.
    assert some.within == pytest.approx(2 * (2e9 + 2e8) * 7 / 8) and some.across == pytest.approx(2 * 2e8 / 8 / 2)
    mixed = dataclasses.replace(model, experts=8, experts_per_token=2)
    assert roofline.weight_bytes(mixed, 3.2e9, itemsize=2, trained=0) == 2 * 1e8
    assert roofline.weight_bytes(mixed, 3.2e9, itemsize=2, trained=1.6e9) == 3 * 1e8


@pytest.mark.slow
def test_plan_of_adapters_holds_their_optimizer_state_and_gradients_alone():
    topology = parse_topology("h100:8")
    fixed = "mesh.tensor=1", "model.param_dtype=bfloat16"
    full, found = (estimate.estimate(recipe("llama3_8b", *fixed, *more), topology) for more in ([], ["lora.rank=16"]))
    # Llama 3 8B: q, k, v, o, gate, up, down.
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    adapters = 32 * 16 * sides
    assert (found.training, found.parameters) == (adapters, full.parameters + adapters)
    assert f", of which {adapters:,} train" in show(found)[1] and "train" not in show(full)[1]
    memory, more = found.parts["update"].memory, full.parts["update"].memory
    assert memory.gradients == 4 * adapters and memory.optimizer == pytest.approx(8 * adapters, abs=16)
    assert memory.weights == more.weights + 4 * adapters
    # No gradient of a matrix: a third of what its products took, and of the head's a fourth; and none sent.
    update, other = found.parts["update"], full.parts["update"]
    work, low = other.work, 2 * adapters * update.work.positions
    products = flops.product_flops(estimate.architecture(full.config), round(work.positions), 0)
    assert update.cost.flops * 8 == pytest.approx(other.cost.flops * 8 - products - work.head + 3 * low)
    assert update.work.training < 0.75 * work.training and 0 < found.mfu < 1
    assert update.cost.ici_bytes / other.cost.ici_bytes == pytest.approx(1 / 2 + adapters / full.parameters, rel=1e-4)
    assert found.parts["scoring"].cost.flops > full.parts["scoring"].cost.flops


@pytest.mark.slow
def test_plan_of_kernels_in_few_bits_holds_less_and_computes_the_same():
    pytest.importorskip("qwix")
    topology, fixed = parse_topology("h100:8"), ("mesh.tensor=1", "lora.rank=16")
    whole, held = (estimate.estimate(recipe("llama3_8b", *fixed, *more), topology) for more in ([], ["lora.base=nf4"]))
    assert (held.training, held.parameters) == (whole.training, whole.parameters)
    update, other = held.parts["update"], whole.parts["update"]
    assert update.work == other.work and update.cost == other.cost and held.mfu == whole.mfu
    # What is not held so: two tables of the vocabulary, norms, adapters.
    kernels = whole.parameters - whole.training - 2 * 128256 * 4096 - 65 * 4096
    saved = kernels / 8 * (4 - 1 / 2 - 4 / 64)
    assert other.memory.weights - update.memory.weights == pytest.approx(saved, rel=1e-3)


def test_memory_traffic_of_a_block_counts_what_tensor_does_not_cut_on_every_chip():
    work = roofline.Work(8, 2.0, 4096.0, 4000.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    llama = estimate.architecture(recipe("llama3_8b"))
    # Twice two bytes: queries and attention's result, keys, values, three of the MLP; norms, results, sums.
    cut, whole = 2 * 4096 + 2 * 1024 + 3 * 14336, 6 * 4096
    for changes, more_cut, more_whole in (
        ({}, 0, 0),
        ({"qk_norm": "head"}, 4096 + 1024, 0),
        ({"norms": "both"}, 0, 2 * 4096),
        # Two experts' MLPs, and their lines in and out.
        ({"experts": 8, "experts_per_token": 2}, 3 * 14336, 4 * 4096),
    ):
        model = dataclasses.replace(llama, **changes)
        for tensor in (1, 4):
            numbers = cut + more_cut + tensor * (whole + more_whole)
            found = roofline.forward_bytes(model, work, chips=8, tensor=tensor, itemsize=2)
            assert found == 2 * 2 * 32 * numbers * 4096 / 8, changes


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_activations_of_experts_are_their_products_and_while_at_work_their_lines(remat):
    dense = estimate.architecture(recipe("llama3_8b"))
    wide = dataclasses.replace(dense, mlp_width=2 * dense.mlp_width)  # as much as two experts
    mixed = dataclasses.replace(dense, experts=8, experts_per_token=2)
    lines, hidden = 4 * dense.width, wide.mlp_width
    kept = {"none": -hidden, "dots": -dense.width, "block": 0}[remat]  # not what `down` reads, or makes
    more = 2 * 4096 * (32 * kept + 2 * lines)
    options: dict[str, Any] = dict(tensor=1, itemsize=2, remat=remat)
    found, other = (roofline.activation_bytes(model, 4096, **options) for model in (mixed, wide))
    assert found == other + more


def test_plan_of_experts_holds_and_reads_them_all():
    chosen = recipe("llama3_8b", f"plan.architecture={MIXTRAL}", "mesh.tensor=1")
    found = estimate.estimate(chosen, parse_topology("h100:64"))
    update, every = found.parts["update"], 46_702_792_704  # parameters of Mixtral 8x7B
    assert update.memory.weights == pytest.approx(4 * every / 64, rel=1e-3)
    # Besides activations and what a chip has of its own, every weight is written and read, forward and backward.
    forward = roofline.forward_bytes(estimate.architecture(chosen), update.work, chips=64, tensor=1, itemsize=2)
    memory, microbatches = update.memory, update.work.microbatches
    own = 2 * (memory.weights + memory.optimizer) + (2 * microbatches + 2) * memory.gradients
    passing = update.cost.hbm_bytes - 3 * forward - own
    assert passing == pytest.approx(microbatches * 4 * 2 * every, rel=1e-3)
    # Of a layer the weights and those of the next, and the gradients of experts, in four bytes.
    kept = roofline.activation_bytes(
        estimate.architecture(chosen), update.shape.positions / 64, tensor=1, itemsize=2, remat="dots"
    )
    assert memory.rest - kept == pytest.approx((2 * 2 + 4) * every / 32, rel=1e-3)


@pytest.mark.parametrize("remat, more", [("none", "dots"), ("dots", "block"), ("block", "offload")])
def test_remat_policies_keep_less_and_less(remat, more):
    model = estimate.architecture(recipe("llama3_8b"))
    keep = lambda name: roofline.activation_bytes(model, 4096, tensor=1, itemsize=2, remat=name)
    assert keep(remat) > keep(more) > keep("")


@pytest.fixture
def run(capsys):
    """Calls the command and returns its exit status, and the text of standard output and standard error."""

    def call(*arguments):
        status = 0
        try:
            cli.main(["dpo-jax", "plan", *arguments])
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


def test_plan_of_gpus_prints_memory_time_and_the_verdict(run):
    status, out, err = run("--config=configs/llama3_8b.py", "--topology=h100:32", "--reference_in_step")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("h100:32: 32 chips of 80.00 GiB, replica 1 x fsdp 8 x tensor 4")
    titles = [line.split("  ")[0] if not line.startswith(" ") else line[2:26].strip() for line in lines]
    for title in ("weights", "optimizer", "gradients", "total", "FLOPs", "bytes over NVLink", "seconds of compute"):
        assert title in titles, out
    assert "update with reference" in out and "chip-hours" in lines[-2] and "MFU" in lines[-3]
    assert lines[-1].startswith("fits: ")
    assert "planning configs/architectures/llama3_8b.json on h100:32, 32 chips\n" in err  # before anything is counted


def test_plan_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as refused:
        devices_of(parse_topology("v5e-4"))
    assert str(refused.value).endswith("any machine. Run pip install 'dpo-jax[plan]'.")


def test_plan_that_does_not_fit_says_what_to_change_and_ends_with_3(run):
    status, out, _ = run("--config=configs/llama3_70b.py", "--topology=h100:8")
    assert status == DOES_NOT_FIT == 3
    last = out.splitlines()[-1]
    assert last.startswith("does not fit: ") and "weights, optimizer and gradients take" in last
    assert "more chips or model.param_dtype=bfloat16" in last


def test_plan_without_a_topology_or_for_a_mesh_that_cannot_be_is_refused(run):
    assert "--topology" in run("--config=configs/llama3_8b.py")[2]
    status, out, err = run("--config=configs/llama3_8b.py", "--topology=h100:8", "--config.mesh.fsdp=3")
    assert status == 2 and "config.mesh" in err and not out


def test_weights_and_optimizer_of_a_plan_are_those_that_a_run_holds():
    found = estimate.estimate(recipe("llama3_8b", "mesh.tensor=1"), parse_topology("h100:64"))
    memory = found.parts["update"].memory
    norms = 65 * 4096 * 4
    every = 8_030_261_248 * 4  # all parameters of Llama 3 8B
    assert memory.weights == (every - norms) // 64 + norms
    assert memory.optimizer == pytest.approx(2 * memory.weights, abs=16)  # two moments, and counters
    assert memory.gradients == memory.weights
    half = recipe("llama3_8b", "mesh.tensor=1", "model.param_dtype=bfloat16")
    smaller = estimate.estimate(half, parse_topology("h100:64")).parts["update"].memory
    assert smaller.weights == memory.weights // 2 and smaller.gradients == memory.gradients


def test_advice_follows_what_takes_the_memory():
    found = estimate.estimate(recipe("llama3_8b"), parse_topology("h100:64"))
    update = found.parts["update"]
    crowded = update._replace(memory=estimate.Memory(1, 1, 1, 2**40))
    for changes, words in (
        ({}, ("model.remat=block", "mesh.tensor=8", "data.max_length")),
        ({"shape": dataclasses.replace(update.shape, rows=4 * update.shape.shards)}, ("train.microbatch_rows=",)),
    ):
        said = verdict(found._replace(parts={"update": crowded._replace(**changes)}))
        assert said.startswith("does not fit: ") and all(word in said for word in words), said


@pytest.mark.slow
def test_sweep_ranks_what_fits_by_time_and_names_every_kind_of_knob():
    topology = parse_topology("h100:16")
    # Of rows of one length: to pack pairs into many is most of the work.
    ranked = sweep(recipe("llama3_8b", "data.row_length=4096"), topology, lambda line: None)
    assert [each.fits for each in ranked] == sorted((each.fits for each in ranked), reverse=True)
    fitting = [each.run_seconds for each in ranked if each.fits]
    assert fitting == sorted(fitting) and len(ranked) > 4
    assert len({tuple(each.mesh.values()) for each in ranked}) > 2
    assert {each.config.model.remat for each in ranked} == set(SWEPT_REMAT)


@pytest.mark.slow
def test_every_chip_of_the_table_can_be_planned_for():
    assert {chip.name for chip in chips.CHIPS} >= {"v4", "v5e", "v5p", "v6e", "h100", "h200"}
    counted = [chip for chip in chips.CHIPS if not chip.dimensions]
    for chip in counted:
        found = estimate.estimate(recipe("pythia_2b8_hh"), parse_topology(f"{chip.name}:8"))
        assert found.fits and 0 < found.mfu < 1, chip.name
    assert jax.process_count() == 1


def test_drawn_pairs_take_about_as_many_positions_as_their_medians_say():
    lengths = estimate.drawn_lengths(recipe("llama3_8b"))
    assert 500 < unit_lengths(lengths, "shared").mean() < 900


@pytest.mark.parametrize(
    ("loss", "updates", "scored"),
    [("kto", 1, 2)]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("bco_pair", 1, 1), ("aot", 1, 1), ("tdpo2", 0, 1), ("simpo", 0, 0))
    ],
)
def test_forward_passes_of_an_objective_are_counted(loss, updates, scored):
    # Of the update, those besides the one that is differentiated; of the reference, how often it scores every pair.
    topology = parse_topology("h100:8")
    found, usual = (
        estimate.estimate(recipe("pythia_2b8_hh", f"loss.name={name}", "plan.pairs=64000"), topology)
        for name in (loss, "sigmoid")
    )
    update = usual.parts["update"]
    assert update.shape.microbatches > 1
    more = found.parts["update"].cost.flops - update.cost.flops
    assert more == pytest.approx(updates * (update.work.needed + update.work.padding) / 8)
    seconds = estimate.updates(found.config) * max(found.seconds("update").values())
    if scored:
        seconds += scored * 64000 / found.pairs_per_s("scoring")
    assert found.run_seconds == pytest.approx(seconds)


def test_reference_that_follows_is_scored_again_for_the_pairs_to_come():
    chosen = recipe("pythia_2b8_hh", "plan.pairs=6400", "train.epochs=1", "train.batch_pairs=64")
    sigmoid = make_loss("sigmoid", {})
    assert estimate.updates(chosen) == 100 and estimate.reference_pairs(chosen, sigmoid) == 6400
    follows = dataclasses.replace(chosen, reference=dataclasses.replace(chosen.reference, sync_steps=30))
    assert estimate.reference_pairs(follows, sigmoid) == 64 * (30 + 30 + 30 + 10)


@pytest.mark.parametrize("loss", ["kto", "tdpo2", "simpo"])
def test_reference_in_the_update_is_refused_where_log_probs_do_not_suffice(loss):
    with pytest.raises(InputError, match="--reference_in_step"):
        topology = parse_topology("h100:8")
        estimate.estimate(recipe("pythia_2b8_hh", f"loss.name={loss}"), topology, reference_in_step=True)
