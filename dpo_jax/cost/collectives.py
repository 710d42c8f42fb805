"""Collectives of a compiled program, and the bytes that they send, read from the text of its optimized HLO.

Devices are numbered as in the program: by their index in `mesh.devices.flat`, not by `device.id`. libtpu turns some
gathers into loops of permutes, or into sums of arrays that are zero but for one device's part. They are listed as the
compiler left them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# How often the larger of operand and result passes around the ring of a group; 0: it is sent once, to one device.
KINDS = {"all-gather": 1, "all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1, "ragged-all-to-all": 1}
KINDS |= {"collective-permute": 0, "collective-broadcast": 0}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """A collective instruction. Bytes are of one device and one execution, summed over arrays that it combines."""

    kind: str  # of KINDS
    shape: str  # of the result, without layout
    bytes_in: float
    bytes_out: float
    groups: tuple[tuple[int, ...], ...]  # devices of each group; for a permute, (source, target) pairs
    times: int  # executions in one call of the program; all branches of a conditional are counted
    source: str  # the operation of the traced function
    over_slices: bool = False  # `groups` are of slices: libtpu compiles one slice, which transfers to the others

    @property
    def bytes_sent(self) -> float:
        """Bytes that a device sends in one execution with ring algorithms: 2 (n - 1) / n of an all-reduce's array."""
        size, whole = len(self.groups[0]), max(self.bytes_in, self.bytes_out)
        return KINDS[self.kind] * (size - 1) / size * whole if KINDS[self.kind] else whole


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    arguments: str  # operands and attributes, as text

    @property
    def operands(self) -> list[str]:
        return [
            name.strip().lstrip("%") for name in re.sub(r"/\*.*?\*/", "", self.arguments).partition(")")[0].split(",")
        ]

    def attribute(self, name: str) -> str:
        match = re.search(rf'\b{name}=(?:"([^"]*)"|%?([\w.-]+))', self.arguments)
        return (match[1] or match[2] or "") if match else ""


_Program = dict[str, list[_Instruction]]


def collectives(text: str, *, unknown_trips: int = 1) -> list[Collective]:
    """Lists the collectives of a program, in order.

    Args:
      text: `compiled.as_text()`, or the dumped file whose name ends in `.after_optimizations.txt`.
      unknown_trips: the assumed trips of a loop whose number of trips is data, such as the loop over microbatches.
    """
    program: _Program = {}
    entry, instructions = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            instructions = program.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            instructions.append(_Instruction(*match.groups()))
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])))

    def walk(name: str, times: int, chains: set[str]) -> Iterator[Collective]:
        for each in program[name]:
            if each.opcode.removesuffix("-start") in KINDS:
                # libtpu fuses the start, steps and end of one collective with the computation that they overlap, also
                # within the body of a loop. Each fusion repeats the collective, with the same chain.
                chain = each.attribute("chain_id") and each.attribute("channel_id") + "/" + each.attribute("chain_id")
                if not chain or chain not in chains:
                    yield _collective(each, times, devices)
                chains.add(chain)
            elif each.opcode == "send" and each.attribute("_xla_megascale_transfer_type"):
                yield _transfer(each, times)
            elif each.opcode == "while":
                yield from walk(each.attribute("body"), times * _trips(program, name, each, unknown_trips), {*chains})
            elif each.opcode not in ("async-update", "async-done"):  # these repeat the computation of their start
                for called in re.findall(r"[\w.-]+", " ".join(map(" ".join, _CALLED.findall(each.arguments)))):
                    yield from walk(called, times, chains if each.opcode == "fusion" else set())

    return list(walk(entry, 1, set()))


def crosses(collective: Collective, slice_of: Callable[[int], int]) -> bool:
    """Whether any group spans several slices, or hosts, by the index that `slice_of` returns for a device."""
    return collective.over_slices or any(len(set(map(slice_of, group))) > 1 for group in collective.groups)


def bytes_across(collective: Collective, slice_of: Callable[[int], int]) -> float:
    """Bytes that a device sends to other slices in one execution, if it runs within slices first, then across.

    With m devices in each of s slices, each device all-reduces its 1/m of the array: 2 (s - 1) / s / m of its bytes.
    """
    if not crosses(collective, slice_of):
        return 0.0
    if collective.over_slices or not KINDS[collective.kind]:
        return collective.bytes_sent
    slices = max(len(set(map(slice_of, group))) for group in collective.groups)
    apart = 1 if collective.kind.endswith("all-to-all") else len(collective.groups[0]) / slices
    whole = max(collective.bytes_in, collective.bytes_out) / apart
    return collective._replace(groups=(tuple(range(slices)),), bytes_in=whole, bytes_out=whole).bytes_sent


def _collective(each: _Instruction, times: int, devices: int) -> Collective:
    kind, arrays = each.opcode.removesuffix("-start"), [*_ARRAY.finditer(each.shape)]
    if kind != each.opcode and kind != "all-reduce":  # its shape is (operands, results, contexts)
        arrays = arrays[len(each.operands) : 2 * len(each.operands)]
    groups, out = _groups(each.arguments, devices), sum(map(_bytes, arrays))
    into = out * {"all-gather": 1 / len(groups[0]), "reduce-scatter": len(groups[0])}.get(kind, 1)
    return Collective(kind, ", ".join(x[0] for x in arrays), into, out, groups, times, each.attribute("op_name"))


def _transfer(each: _Instruction, times: int) -> Collective:
    """Reads a transfer between slices; `_xla_megascale_target` is "{1,2}x{0:15}", slices and devices."""
    kind = each.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
    kind = kind if kind in KINDS else "collective-permute"
    slices = tuple(_numbers(each.attribute("_xla_megascale_target").partition("}")[0].strip("{")))
    into = _bytes(array := next(_ARRAY.finditer(each.shape)))
    out = into * {"all-gather": len(slices), "reduce-scatter": 1 / len(slices)}.get(kind, 1)
    return Collective(kind, array[0], into, out, (slices,), times, each.attribute("op_name"), over_slices=True)


def _bytes(array: re.Match) -> float:
    bits = {"pred": 8, "token": 0}.get(array[1], int(array[2] or 0))
    return math.prod(_numbers(array[3])) * bits / 8


def _numbers(text: str) -> list[int]:
    """Parses "0,2", or "0:3" for 0 to 3."""
    spans = (part.partition(":") for part in text.split(",") if part)
    return [i for first, _, last in spans for i in range(int(first), int(last or first) + 1)]


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parses groups: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['x'=2,'y'=4], device_ids=([8]) {'y'}`, or `{}`."""
    if explicit := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([^}]*)\}", explicit[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\]\S*)", attributes):
        groups = _iota(iota[2].rstrip(",")).reshape(_numbers(iota[1]))
    elif mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*)\))? \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2] or str([math.prod(sizes.values())]))
        # A group may span a part of an axis: 'x':(2)4 is the 4 in the middle of x as 2 * 4 * remainder.
        axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])
        taken = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in axes}
        parts = [(*taken.get(name, (1, 1)), size) for name, size in sizes.items()]
        shape = [n for before, inside, size in parts for n in (before, inside, size // (before * inside))]
        order = sorted(range(len(shape)), key=lambda at: at % 3 == 1)
        groups = ids.reshape(shape).transpose(order).reshape(-1, math.prod(shape[1::3]))
    else:
        groups = np.arange(devices)[None]
    return tuple(map(tuple, groups.tolist()))


def _iota(text: str) -> np.ndarray:
    """Parses `[4,2]T(1,0)`: the numbers from 0 in an array of shape [4, 2], transposed by (1, 0)."""
    dims, _, order = text.partition("T")
    shape = _numbers(dims.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order.strip("()"))) if order else ids


def _trips(program: _Program, caller: str, loop: _Instruction, unknown: int) -> int:
    """Returns the trips of a `while`, from its annotation or its counter; `unknown` if they depend on data."""
    if annotated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.arguments):
        return int(annotated[1])
    names = caller, loop.attribute("condition"), loop.attribute("body")
    outside, condition, body = ({each.name: each for each in program[name]} for name in names)
    tests = (each for each in condition.values() if each.opcode == "compare" and "direction=LT" in each.arguments)
    counter, most = next((each.operands for each in tests), ("", ""))
    read, limit = condition.get(counter), _constant(condition, most)
    if read is None or read.opcode != "get-tuple-element" or limit is None:
        return unknown
    index = int(read.attribute("index"))
    start = _constant(outside, outside[loop.operands[0]].operands[index]) or 0
    after = body.get(next(reversed(body.values())).operands[index])
    by = [_constant(body, name) for name in after.operands] if after is not None and after.opcode == "add" else []
    return -(-(limit - start) // next(filter(None, by), 1))


def _constant(instructions: dict[str, _Instruction], name: str) -> int | None:
    """Returns the value of a constant, or of a copy of one; None for anything else."""
    each = instructions.get(name)
    if each is not None and each.opcode in ("copy", "bitcast"):
        return _constant(instructions, each.operands[0])
    return int(each.operands[0]) if each is not None and each.opcode == "constant" else None
