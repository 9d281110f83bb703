"""The collectives of a compiled program, by kind, and what each device sends for them."""

import dataclasses
import math
import re

import numpy as np

from experiments.compilation.hlo import Program, Run

# What a device sends, as a share of its operand's bytes, in a group of g (ring algorithms).
_SENT = {
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,  # its operand's bound: what moves is data
    "collective-permute": lambda g: 1,
    "collective-broadcast": lambda g: 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind over groups of one shape, in one step."""

    kind: str
    group: int  # devices that take part together
    hosts: int  # over which a group is spread, where hosts are what links do not span
    count: int
    bytes: float  # that one device sends
    network_bytes: float  # of these, through its share of the host's network


def collectives(program: Program, num_devices: int, devices_per_host: int | None) -> list[Traffic]:
    """Of a whole step, the largest first; devices_per_host None: all devices are joined by links."""
    seen: set[tuple[str, str]] = set()
    found: dict[tuple[str, int, int], list[tuple[int, float, float]]] = {}
    for run in program.runs:
        kind = _kind(run)
        if kind is None or _seen_before(run, seen):
            continue
        group = _group(run, num_devices)
        g = len(group)
        if g < 2:
            continue
        hosts = 1 if devices_per_host is None else len({device // devices_per_host for device in group})
        operands = run.instruction.operands[:1] if kind == "ragged-all-to-all" else run.instruction.operands
        given = sum(run.computation[name].bytes for name in operands if name in run.computation)
        sent = given * _SENT[kind](g)
        entry = run.times, run.times * sent, run.times * _network_share(kind, g, hosts) * sent
        found.setdefault((kind, g, hosts), []).append(entry)
    lines = [
        Traffic(kind=kind, group=g, hosts=hosts, count=count, bytes=sent, network_bytes=network)
        for (kind, g, hosts), entries in found.items()
        for count, sent, network in [tuple(map(sum, zip(*entries, strict=True)))]
    ]
    return sorted(lines, key=lambda line: -line.bytes)


def _kind(run: Run) -> str | None:
    opcode = run.instruction.opcode.removesuffix("-start")
    if opcode == "all-reduce" and run.fused and _is_only_sliced(run):  # how XLA:TPU writes a reduce-scatter
        return "reduce-scatter"
    return opcode if opcode in _SENT else None


def _is_only_sliced(run: Run) -> bool:
    users = [each for each in run.computation.values() if run.instruction.name in each.operands]
    return bool(users) and all(each.opcode in ("dynamic-slice", "slice") for each in users)


def _seen_before(run: Run, seen: set[tuple[str, str]]) -> bool:
    """XLA:TPU repeats a collective in every fusion that it overlaps with; the repetitions share a chain."""
    chain = run.instruction.attribute(r'chain_id="(\d+)"')
    if not chain:
        return False
    key = run.owner, chain
    before = key in seen
    seen.add(key)
    return before


def _group(run: Run, num_devices: int) -> list[int]:
    """The devices of the first group."""
    instruction = run.instruction
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]*)\}"):
        return [int(each) for each in listed.split(",")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(math.prod(dims or ())).reshape(dims or ())
        return (ids if order is None else ids.transpose(order)).reshape(shape or ())[0].tolist()
    if found := re.search(
        r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        instruction.attributes,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", found[1])}
        ids = np.arange(math.prod(sizes.values()))
        if found[2]:
            ids = ids.reshape([int(n) for n in found[2].split(",")])
            ids = ids.transpose([int(n) for n in found[3].split(",")]) if found[3] else ids
        together = set(re.findall(r"'\w+'", found[4]))
        return (
            ids.reshape(tuple(sizes.values()))[tuple(slice(None) if name in together else 0 for name in sizes)]
            .ravel()
            .tolist()
        )
    if pairs := re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=\{(.*?\})\}")):
        return sorted({int(device) for device in pairs[-1]})
    return list(range(num_devices))


def _network_share(kind: str, g: int, hosts: int) -> float:
    """Of what a device sends, what leaves its host when the g / hosts members there share the way out."""
    if hosts == 1:
        return 0.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return (g - g / hosts) / (g - 1)
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    # Hierarchical rings: what is common to a host enters it once.
    inside = g / hosts
    return (1 - 1 / hosts) / inside / ((g - 1) / g)
