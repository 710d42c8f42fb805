"""Estimates for absent hardware: memory of a chip, least time of a step, and days that a run takes.

For TPUs the real update and the real scoring program are compiled ahead of time, by libtpu, for the topology that is
named; memory is then what the compiler reports, and traffic between chips is read from the compiled programs. For
GPUs, for which nothing compiles without the device, both are counted from shapes. Neither weights nor data are read.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int, PyTree

from dpo_jax import sharding, steps, trees
from dpo_jax.config import Config
from dpo_jax.cost import flops, roofline
from dpo_jax.cost.collectives import Collective, bytes_across, collectives
from dpo_jax.cost.roofline import Cost, Work
from dpo_jax.data import packing
from dpo_jax.data.batches import ReferenceValues, TokenValues, make_batch
from dpo_jax.hf import folders
from dpo_jax.hf.families import family
from dpo_jax.losses import Objective
from dpo_jax.models.config import DecoderConfig
from dpo_jax.optim import Optimizer
from dpo_jax.plan.topology import Topology, devices_of, extents
from dpo_jax.run import choices
from dpo_jax.run.programs import (
    Numbers,
    Programs,
    crops,
    jit_update,
    make_programs,
    make_update,
    numbers_of,
    update_step,
    without_devices,
)
from dpo_jax.run.state import abstract_params, abstract_state, placed
from dpo_jax.run.trainable import Trainable
from dpo_jax.runtime import files, xla
from dpo_jax.runtime.terminal import say
from dpo_jax.steps import TrainState
from dpo_jax.types import Batch, Encoded, InputError, counted

DRAWN_PAIRS = 4096  # most random pairs that stand in for the data
SPREAD = 0.7  # standard deviation of the logarithm of a length, about that of HH and of UltraFeedback


class Memory(NamedTuple):
    """Bytes on a chip while a program runs."""

    weights: int
    optimizer: int
    gradients: int  # their sums, float32
    rest: int  # activations, gathered weights, batch, program

    @property
    def total(self) -> int:
        return sum(self)


class Part(NamedTuple):
    """One program of a run: the update, or scoring."""

    shape: packing.Shape
    work: Work
    memory: Memory
    cost: Cost
    moved: list[Collective]  # empty where nothing was compiled


class Estimate(NamedTuple):
    """Memory and least time of each program of one configuration."""

    config: Config
    topology: Topology
    mesh: dict[str, int]
    attention: str
    parameters: int
    training: int  # parameters that train
    reference_pairs: int  # pairs that the reference scores in the run
    parts: dict[str, Part]

    @property
    def bytes(self) -> int:
        """Bytes on a chip, of the program that takes the most."""
        return max(part.memory.total for part in self.parts.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.topology.chip.hbm_bytes

    def seconds(self, part: str) -> dict[str, float]:
        """Returns the least time of a call by each resource that could bound it."""
        return self.parts[part].cost.seconds(self.topology.chip)

    def pairs_per_s(self, part: str) -> float:
        """Returns the most pairs a second that a program can process."""
        return self.parts[part].shape.pairs / max(self.seconds(part).values())

    @property
    def mfu(self) -> float:
        """MFU of the update at its least time: operations that its real tokens need over the peak of all chips."""
        update, chip = self.parts["update"], self.topology.chip
        return update.work.training / (max(self.seconds("update").values()) * chip.flops * self.topology.count)

    @property
    def run_seconds(self) -> float:
        """Least time of the reference pass, every pass after a reference sync included, and of all updates."""
        scoring = self.reference_pairs / self.pairs_per_s("scoring") if "scoring" in self.parts else 0.0
        return scoring + updates(self.config) * max(self.seconds("update").values())


def architecture(config: Config) -> DecoderConfig:
    """Reads the model's shape from `plan.architecture`, or from the folder or Hub id `model.path`.

    Raises: InputError if there is none.
    """
    hf, place = described(config)
    return family(hf, place).decoder_config(hf, place)


def selected(config: Config, model: DecoderConfig) -> Trainable:
    """Returns which parameters of the model train."""
    hf, place = described(config)
    return choices.trainable_of(config, family(hf, place).tensors(model), model)


def described(config: Config) -> tuple[dict, str]:
    """Returns the contents of the model's config.json, and its path."""
    if not config.plan.architecture:
        path = folders.config_file(config.model.path, "config.model.path")
    elif not (path := files.path(config.plan.architecture, "config.plan.architecture")).is_file():
        raise InputError(
            "config.plan.architecture",
            got=f"no file {path}",
            expected="the config.json of a model",
            remedy="Give a file, or leave it empty and give a folder or Hub id as --config.model.path=MODEL.",
        )
    return folders.read_json(path), str(path)


def drawn_lengths(config: Config) -> Int[np.ndarray, "N 3"]:
    """Draws token counts of pairs around the medians of `plan`, truncated as `data` says.

    One pair is as long as the limits allow, for one such pair decides how long rows are.
    """
    count = min(config.plan.pairs, DRAWN_PAIRS)
    medians = np.array([config.plan.prompt_tokens, config.plan.answer_tokens, config.plan.answer_tokens])
    drawn = np.exp(np.random.default_rng(0).normal(np.log(medians), SPREAD, (count, 3))).astype(np.int64)
    data = config.data
    drawn[0] = data.max_length
    prompt = np.clip(drawn[:, 0], 1, data.max_prompt_length)
    answers = np.clip(drawn[:, 1:], 1, data.max_length - prompt[:, None])
    return np.concatenate([prompt[:, None], answers], 1)


def updates(config: Config) -> int:
    """Returns the updates of a run on `plan.pairs` pairs."""
    return config.train.steps or max(1, int(config.train.epochs * config.plan.pairs) // config.train.batch_pairs)


def reference_pairs(config: Config, objective: Objective) -> int:
    """Returns the pairs that the reference scores in a run on `plan.pairs` pairs."""
    pairs, total = config.plan.pairs, updates(config)
    every = config.reference.sync_steps or total  # updates under one reference, which scores the pairs that they read
    scored = sum(min(pairs, min(every, total - at) * config.train.batch_pairs) for at in range(0, total, every))
    return scored * (2 if "kl" in objective.needs else 1)  # each prompt with another's answers


def estimate(config: Config, topology: Topology, *, reference_in_step: bool = False) -> Estimate:
    """Estimates memory and time of a configuration: compiled for a TPU topology, or counted from shapes for GPUs.

    Args:
      reference_in_step: hold the reference's weights, in the compute type, and score with them in every update, as
        other trainers do, for comparison.
    Raises: InputError for a mesh, rules or shapes that do not fit, without libtpu, or with `reference_in_step` for an
      objective that reads no reference, or more of it than its log-probs.
    """
    objective = choices.objective_of(config.loss)
    if reference_in_step and (
        objective.reference_free or objective.reference_tokens is not None or "kl" in objective.needs
    ):
        raise InputError(
            "--reference_in_step",
            got=f"loss {config.loss.name!r}, which reads no reference, or more of it than the log-probs of answers",
            expected="a loss that compares the log-probs of answers with the reference's",
            remedy="Leave the flag off.",
        )
    model, lengths = architecture(config), drawn_lengths(config)
    trainable = selected(config, model)
    compiles = bool(topology.chip.dimensions)
    if compiles:
        programs = make_programs(config, objective, model, lengths, trainable=trainable, devices=devices_of(topology))
    else:
        programs = without_devices(
            config, objective, model, lengths, topology.count, platform="gpu", trainable=trainable
        )
    tx, _ = choices.optimizer_of(config.optimizer, total_steps=updates(config), trainable=trainable)
    state, (_, frozen) = abstract_state(programs, tx), abstract_params(programs)
    update = make_update(programs, tx, state) if compiles else None
    calls: dict[str, tuple[packing.Shape, xla.Compiled | None, tuple]] = {
        "update": (programs.update_shape, update, (state, frozen)),
        "scoring": (programs.score_shape, programs.reference_scoring, (trees.join(state.params, frozen),)),
    }
    if reference_in_step:
        reference = as_type(trees.join(state.params, frozen), programs.dtype)
        update = with_reference(programs, tx, state) if compiles else None
        calls["update"] = programs.update_shape, update, (state, frozen, reference)
    if reference_in_step or programs.objective.reference_free:
        del calls["scoring"]
    parts = {name: part_of(topology, programs, lengths, name, *call) for name, call in calls.items()}
    training, fixed = trainable.count_parameters(model)
    return Estimate(
        config=config,
        topology=topology,
        mesh=dict(programs.mesh.shape),
        attention=programs.attention,
        parameters=training + fixed,
        training=training,
        reference_pairs=reference_pairs(config, objective),
        parts=parts,
    )


def with_reference(programs: Programs, tx: Optimizer, state: TrainState) -> xla.Compiled:
    """Returns the update(state, frozen, reference, batch) that scores with the reference's parameters first."""
    step, logps_fn = update_step(programs, tx)
    score = steps.make_score_step(logps_fn, has_aux=True, crops=crops(programs.update_shape))

    def update(state: TrainState, frozen: PyTree, reference: PyTree, batch: Batch, numbers: Numbers) -> PyTree:
        return step(state, frozen, batch._replace(reference=score(reference, batch)[0]), numbers)

    return jit_update("update with the reference in it", update, programs, state, numbers_of(programs, tx))


def part_of(
    topology: Topology,
    programs: Programs,
    lengths: np.ndarray,
    name: str,
    shape: packing.Shape,
    program: xla.Compiled | None,
    arguments: tuple,
) -> Part:
    """Returns memory and cost of one program.

    Args:
      program: None: memory and traffic are counted from shapes.
      arguments: all but the batch: the parameters to score with; or the state, the frozen parameters and, if any,
        those of the reference.
    """
    update = name == "update"
    state = arguments[0]
    params = state.params if update else state
    weights = sharding.bytes_per_device((params, arguments[1:]))
    trained = sharding.bytes_per_device(params)
    optimizer = sharding.bytes_per_device(state.opt_state) if update else 0
    gradients = sharding.bytes_per_device(as_type(params, jnp.float32)) if update else 0
    trainable, shapes = programs.trainable, programs.trainable.leaf_shapes(programs.model)
    shares = functools.partial(flops.shares_of, programs.model, shapes)
    work = roofline.mean_work(
        programs.model, lengths, shape, shares(trainable.trained_fraction), shares(trainable.trains)
    )
    itemsize = np.dtype(programs.dtype).itemsize
    used = trees.nest({path: jax.ShapeDtypeStruct(shape, programs.dtype) for path, shape in shapes.items()})
    gathered, training = (
        sharding.bytes_per_device(placed(programs, tree), gathered="fsdp") for tree in (used, trainable.split(used)[0])
    )
    execution = roofline.Execution(dict(programs.mesh.shape), itemsize, programs.remat)
    chip_bytes = roofline.ChipBytes(gathered, training, trained + optimizer, gradients)
    count = functools.partial(roofline.counted, programs.model, work, topology.chip, execution, chip_bytes)
    cost = count(update=update)
    for _ in range(forward_passes(programs, shape, len(arguments) > 2) if update else 0):
        cost = cost.plus(count(update=False))
    if program is None:
        positions = shape.positions / shape.shards
        rest = roofline.activation_bytes(
            programs.model,
            positions,
            tensor=programs.mesh.shape["tensor"],
            itemsize=itemsize,
            remat=programs.remat if update else "",
        )
        rest += roofline.weight_bytes(programs.model, gathered, itemsize=itemsize, trained=training if update else 0)
        return Part(shape, work, Memory(weights, optimizer, gradients, int(rest)), cost, [])
    say(f"compiling the {name} for {topology}, {counted(topology.count, 'chips')} ...")
    total, text = compiled(program, (*arguments, abstract_batch(programs, shape, update=update)))
    rest = max(0, total - weights - optimizer - gradients)
    # Where microbatches come in several sizes, each has a loop of its own.
    trips = max(1, round(work.microbatches / len(shape.sizes)))
    moved = collectives(text, unknown_trips=trips) if text else []  # empty if the program does not fit
    cost = sent(cost, moved, topology, programs.mesh) if text else cost
    return Part(shape, work, Memory(weights, optimizer, gradients, rest), cost, moved)


def forward_passes(programs: Programs, shape: packing.Shape, reference_in_step: bool) -> int:
    """Counts the forward passes over its pairs that an update makes besides differentiating."""
    mismatched = "kl" in programs.objective.needs
    return reference_in_step + mismatched + steps.scores_first(programs.objective, shape.microbatches)


def as_type(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Returns shapes and shardings of a tree of arrays, with another type."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


def abstract_batch(programs: Programs, shape: packing.Shape, *, update: bool) -> Batch:
    """Returns shapes, types and shardings of a batch to score, or of one to update on with all the objective reads."""
    token, objective = np.zeros(1, np.int32), programs.objective
    pairs: Any = [Encoded(token, token, token)]
    values, mismatched = None, None
    if update and not objective.reference_free:
        each = np.zeros((1, 2))
        likely = objective.reference_tokens
        tokens = TokenValues.empty(np.ones((1, 2), np.int64), likely) if likely else None
        sums = {"shared_logps": each} if likely is not None else {}
        mismatched = pairs if "kl" in objective.needs else None
        values = ReferenceValues(np.zeros(1, np.int64), each, sums, tokens, each if mismatched else None)
    batch = make_batch(np.zeros(1, np.int64), pairs, values, shape, mismatched=mismatched)
    places = sharding.batch_shardings(programs.mesh, batch)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place), batch, places
    )


def compiled(program: xla.Compiled, args: tuple) -> tuple[int, str]:
    """Returns the bytes a chip needs, by the compiler, and the text of the program, empty if it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        # `as_text` fails on what libtpu does asynchronously; a dump does not.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            memory = program.compile(*args, options=dump).memory_analysis()
        except Exception as error:
            needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
            if not needed:
                raise
            return int(float(needed[1]) * 2 ** (10 * " KMGT".index(needed[2]))), ""
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return memory_of(memory), texts[-1].read_text() if texts else ""


def memory_of(stats: Any) -> int:
    """Returns the peak bytes on a chip, from the compiler's statistics; donated arrays count once."""
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + new + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def sent(cost: Cost, moved: Sequence[Collective], topology: Topology, mesh: Mesh) -> Cost:
    """Returns the cost with the bytes that the compiled program sends in place of counted ones."""
    devices = list(mesh.devices.flat)
    seconds = ici = dcn = 0.0
    for each in moved:
        across = bytes_across(each, lambda i: sharding.slice_of(devices[i]))
        within = 0.0 if each.over_slices else each.bytes_sent
        spans = [] if each.over_slices else extents([devices[i].coords for i in each.groups[0]], topology)
        rate = topology.chip.ring_bytes_per_s(spans, topology.shape) if spans else 0.0
        rate = rate or topology.chip.link_bytes_per_s
        seconds += each.times * within / rate
        ici, dcn = ici + each.times * within, dcn + each.times * across
    return dataclasses.replace(cost, ici_seconds=seconds, ici_bytes=ici, dcn_bytes=dcn)
