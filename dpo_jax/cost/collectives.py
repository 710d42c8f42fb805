"""What a compiled program sends between devices: its collectives, read from the text of the optimized HLO.

Devices are numbered as the program does: by place in `mesh.devices.flat`, not by `device.id`. libtpu turns gathers
into loops of permutes, or sums of arrays that are zero but for a device's part; they are listed as what they became.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# How often the larger of operand and result goes round the ring of a group; 0: it goes whole, and once.
KINDS = {"all-gather": 1, "all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1, "ragged-all-to-all": 1}
KINDS |= {"collective-permute": 0, "collective-broadcast": 0}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One collective instruction; bytes are of one device and one execution, combined arrays added up."""

    kind: str  # of KINDS
    shape: str  # of the result, without layout
    bytes_in: float
    bytes_out: float
    groups: tuple[tuple[int, ...], ...]  # devices that take part together; of a permute (source, target) pairs
    times: int  # executions in a call of the program; every branch of a conditional counts
    source: str  # the operation of the traced function that it came from
    over_slices: bool = False  # `groups` number slices: libtpu compiles one slice, and what leaves it is a transfer

    @property
    def bytes_sent(self) -> float:
        """What a device sends in one execution, where arrays go round a ring: 2 (n - 1) / n of an all-reduce."""
        size, whole = len(self.groups[0]), max(self.bytes_in, self.bytes_out)
        return KINDS[self.kind] * (size - 1) / size * whole if KINDS[self.kind] else whole


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return [name.strip().lstrip("%") for name in re.sub(r"/\*.*?\*/", "", self.rest).partition(")")[0].split(",")]

    def attribute(self, name: str) -> str:
        found = re.search(rf'\b{name}=(?:"([^"]*)"|%?([\w.-]+))', self.rest)
        return (found[1] or found[2] or "") if found else ""


_Program = dict[str, list[_Instruction]]


def collectives(text: str, *, unknown_trips: int = 1) -> list[Collective]:
    """The collectives of a program, in order.

    Args:
      text: `compiled.as_text()`, or the file of a dump whose name ends in `.after_optimizations.txt`.
      unknown_trips: how often loops run whose number of trips is data, such as those over microbatches.
    """
    program: _Program = {}
    entry, into = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            into = program.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            into.append(_Instruction(*found.groups()))
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])))

    def walk(name: str, times: int, chains: set[str]) -> Iterator[Collective]:
        for each in program[name]:
            if each.opcode.removesuffix("-start") in KINDS:
                # libtpu fuses start, steps and end of one collective with what they overlap, also with the body of a
                # loop between them; each names it again.
                chain = each.attribute("chain_id") and each.attribute("channel_id") + "/" + each.attribute("chain_id")
                if not chain or chain not in chains:
                    yield _collective(each, times, devices)
                chains.add(chain)
            elif each.opcode == "send" and each.attribute("_xla_megascale_transfer_type"):
                yield _transfer(each, times)
            elif each.opcode == "while":
                yield from walk(each.attribute("body"), times * _trips(program, name, each, unknown_trips), {*chains})
            elif each.opcode not in ("async-update", "async-done"):  # which name what their start has named
                for called in re.findall(r"[\w.-]+", " ".join(map(" ".join, _CALLED.findall(each.rest)))):
                    yield from walk(called, times, chains if each.opcode == "fusion" else set())

    return list(walk(entry, 1, set()))


def crosses(collective: Collective, slice_of: Callable[[int], int]) -> bool:
    """Whether any group spans slices, or hosts, or whatever `slice_of` gives of a device's number."""
    return collective.over_slices or any(len(set(map(slice_of, group))) > 1 for group in collective.groups)


def bytes_across(collective: Collective, slice_of: Callable[[int], int]) -> float:
    """What a device sends to other slices in one execution, where that is done in each slice first and then across.

    Of m devices in each of s slices each sends its 1/m of an all-reduce round: 2 (s - 1) / s / m.
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
    if kind != each.opcode and kind != "all-reduce":  # (operands, results, and what the end waits for)
        arrays = arrays[len(each.operands) : 2 * len(each.operands)]
    groups, out = _groups(each.rest, devices), sum(map(_bytes, arrays))
    into = out * {"all-gather": 1 / len(groups[0]), "reduce-scatter": len(groups[0])}.get(kind, 1)
    return Collective(kind, ", ".join(x[0] for x in arrays), into, out, groups, times, each.attribute("op_name"))


def _transfer(each: _Instruction, times: int) -> Collective:
    """A slice's part of a collective over slices; `_xla_megascale_target` is "{1,2}x{0:15}", slices and devices."""
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
    """Of `0,2`, or of `0:3`, which is 0 to 3."""
    spans = (part.partition(":") for part in text.split(",") if part)
    return [i for first, _, last in spans for i in range(int(first), int(last or first) + 1)]


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['x'=2,'y'=4], device_ids=([8]) {'y'}`, or `{}`."""
    if explicit := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([^}]*)\}", explicit[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\]\S*)", attributes):
        found = _iota(iota[2].rstrip(",")).reshape(_numbers(iota[1]))
    elif mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*)\))? \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2] or str([math.prod(sizes.values())]))
        # An axis may take part in part: of 'x':(2)4 the 4 in the middle of 2 * 4 * rest.
        axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])
        taken = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in axes}
        parts = [(*taken.get(name, (1, 1)), size) for name, size in sizes.items()]
        shape = [n for before, inside, size in parts for n in (before, inside, size // (before * inside))]
        order = sorted(range(len(shape)), key=lambda at: at % 3 == 1)
        found = ids.reshape(shape).transpose(order).reshape(-1, math.prod(shape[1::3]))
    else:
        found = np.arange(devices)[None]
    return tuple(map(tuple, found.tolist()))


def _iota(text: str) -> np.ndarray:
    """Of `[4,2]T(1,0)`: the numbers from 0, laid out so and then transposed."""
    dims, _, order = text.partition("T")
    shape = _numbers(dims.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order.strip("()"))) if order else ids


def _trips(program: _Program, caller: str, loop: _Instruction, unknown: int) -> int:
    """Trips of a `while`, as the compiler or else its counter says; `unknown` where their number is data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    names = caller, loop.attribute("condition"), loop.attribute("body")
    outside, condition, body = ({each.name: each for each in program[name]} for name in names)
    tests = (each for each in condition.values() if each.opcode == "compare" and "direction=LT" in each.rest)
    counter, most = next((each.operands for each in tests), ("", ""))
    read, limit = condition.get(counter), _constant(condition, most)
    if read is None or read.opcode != "get-tuple-element" or limit is None:
        return unknown
    index = int(read.attribute("index"))
    start = _constant(outside, outside[loop.operands[0]].operands[index]) or 0
    after = body.get(next(reversed(body.values())).operands[index])
    by = [_constant(body, name) for name in after.operands] if after is not None and after.opcode == "add" else []
    return -(-(limit - start) // next(filter(None, by), 1))


def _constant(of: dict[str, _Instruction], name: str) -> int | None:
    """The number that a name stands for, copied or not."""
    each = of.get(name)
    if each is not None and each.opcode in ("copy", "bitcast"):
        return _constant(of, each.operands[0])
    return int(each.operands[0]) if each is not None and each.opcode == "constant" else None
