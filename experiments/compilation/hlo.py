"""Reads compiled HLO text: how often each instruction runs, and the products, memory traffic and collectives of a whole program."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}  # the others carry theirs in the name
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]+m[0-9]+[a-z]*)?)\[([0-9,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)|(?:branch|called)_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # TPU: in VMEM or SMEM, not in HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(re.findall(r"\d+", self.dtype)[0])
        return -(-self.size * (bits or 0) // 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str  # what stands behind the operands
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(
            Array(
                dtype=dtype,
                dims=tuple(map(int, filter(None, dims.split(",")))),
                on_chip=re.search(r"S\([1-9]", layout) is not None,
            )
            for dtype, dims, layout in _ARRAY.findall(self.type)
        )

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if not array.on_chip)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it names."""
        found = [one or many for one, many in _CALLED.findall(self.attributes)]
        return tuple(name.strip().removeprefix("%") for names in found for name in names.split(","))

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes; "" if it is not there."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def numbers(self, pattern: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", self.attribute(pattern))))

    @property
    def target(self) -> str:
        """What a custom call calls, "" of any other instruction."""
        return self.attribute(r'custom_call_target="([^"]*)"') if self.opcode == "custom-call" else ""

    def estimate(self, what: str) -> int:
        """`flops` or `bytes_accessed` as a Pallas kernel for TPU states them, 0 of any other instruction."""
        if self.target != "tpu_custom_call":
            return 0
        return int(self.attribute(rf'"cost_estimate":\{{[^}}]*"{what}":"(\d+)"') or 0)


Computation = dict[str, Instruction]  # by name, in order


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often a step runs it."""

    instruction: Instruction
    computation: Computation  # where it stands
    owner: str  # the nearest computation that is no fusion
    times: int
    fused: bool


class Program:
    """The computations of one compiled module."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                root, name, kind, opcode, rest = found.groups()
                inside, outside = _split_operands(rest)
                current[name] = Instruction(
                    name=name,
                    opcode=opcode,
                    type=kind,
                    operands=tuple(re.findall(r"%([\w.-]+)", inside))
                    if opcode not in ("constant", "parameter")
                    else (inside,),
                    attributes=outside,
                    is_root=bool(root),
                )
            elif found := _HEADER.match(line):
                current = self.computations[found[2]] = {}
                if found[1]:
                    self.entry = found[2]
        self.unknown_loops: set[str] = set()  # their length is data; they count once
        self.conditionals: set[str] = set()  # of their branches the lightest counts: the others are exceptions
        self.runs: list[Run] = list(self._walk(self.entry, self.entry, 1, fused=False))

    def _walk(self, name: str, owner: str, times: int, *, fused: bool) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, owner, times, fused)
            if instruction.opcode == "while":
                length = self._trip_count(instruction, computation)
                if length is None:
                    self.unknown_loops.add(instruction.name)
                body = instruction.attribute(r"body=%?([\w.-]+)")
                yield from self._walk(body, body, times * (1 if length is None else length), fused=False)
            elif instruction.opcode == "fusion" or instruction.opcode.startswith("async"):
                for each in instruction.called:
                    yield from self._walk(each, owner, times, fused=True)
            elif instruction.opcode in ("call", "call-start"):  # started: on a core of its own, as TPU v7 gathers
                for each in instruction.called:
                    yield from self._walk(each, each, times, fused=fused)
            elif instruction.opcode == "conditional":
                self.conditionals.add(instruction.name)
                branches = [list(self._walk(each, each, times, fused=fused)) for each in instruction.called]
                yield from min(branches, key=_weight)

    def _trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """What the compiler noted, else the constant that the counter stays below; None where the length is data."""
        if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(noted)
        condition = self.computations[loop.attribute(r"condition=%?([\w.-]+)")]
        root = next(each for each in condition.values() if each.is_root)
        if root.opcode == "fusion":
            return None
        if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
            return None
        counter, bound = (condition[name] for name in root.operands)
        if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        start = self._start(loop, computation, int(counter.attribute(r"index=(\d+)")))
        return int(bound.operands[0]) - start

    def _start(self, loop: Instruction, computation: Computation, index: int) -> int:
        """The value with which a loop's counter begins; 0, as `lax.scan` counts, where that is not a plain constant."""
        given = computation[loop.operands[0]]
        value = computation[given.operands[index]] if given.opcode == "tuple" else given
        while value.opcode in ("copy", "bitcast") and value.operands:
            value = computation[value.operands[0]]
        return int(value.operands[0]) if value.opcode == "constant" else 0

    # --- floating-point operations of matrix products --------------------------------------------------------------------------

    def product_flops(self) -> float:
        """Multiply-adds, counted as two, of all matrix products and convolutions on one device.

        Pallas kernels for TPU say themselves how many they take; those for GPUs do not (`silent_kernels`).
        """
        return float(sum(map(_flops, self.runs)))

    @property
    def silent_kernels(self) -> int:
        """Runs of Pallas kernels for GPUs."""
        return sum(run.times for run in self.runs if "mosaic_gpu" in run.instruction.target)

    # --- memory ------------------------------------------------------------------------------------------------------------------

    def memory_bytes(self) -> float:
        """Read from and written to device memory by one device: what instructions outside of fusions take and give.

        Of an operand that a fusion only slices, and of a result that it only updates in place, the slice counts; of a kernel that
        reads operands more than once, its own estimate.
        """
        return float(sum(run.times * self._traffic(run) for run in self.runs if not run.fused))

    def _traffic(self, run: Run) -> int:
        instruction = run.instruction
        if instruction.opcode in _FREE or instruction.target in _FREE or instruction.opcode.endswith("-done"):
            return 0
        operands = [run.computation[name] for name in instruction.operands if name in run.computation]
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * instruction.hbm_bytes
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[-1 if instruction.opcode == "scatter" else 1].hbm_bytes
        if (
            instruction.opcode == "slice-start"
        ):  # TPU: a part of an array on its way to VMEM; the type names the whole too
            whole, part = instruction.arrays[:2]
            return part.bytes * ((not whole.on_chip) + (not part.on_chip))
        if instruction.opcode.endswith("-start"):  # the type names operands and results
            return instruction.hbm_bytes
        if instruction.opcode != "fusion":
            once = instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)
            return max(once, instruction.estimate("bytes_accessed"))
        inside = self.computations[instruction.called[0]]
        parameters = {int(each.operands[0]): each for each in inside.values() if each.opcode == "parameter"}
        read = sum(_read(operand, parameters[i], inside) for i, operand in enumerate(operands))
        root = next(each for each in inside.values() if each.is_root)
        roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        roots = [inside[each.operands[0]] if each.opcode == "bitcast" else each for each in roots]
        in_place = sum(
            each.bytes - inside[each.operands[1]].bytes for each in roots if each.opcode == "dynamic-update-slice"
        )
        return read + max(instruction.hbm_bytes - in_place, 0)


_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "call-start",
    "after-all",
    "iota",
    "AllocateBuffer",
    "ConcatBitcast",
}


def _read(operand: Instruction, parameter: Instruction, inside: Computation) -> int:
    """Bytes that a fusion reads of an operand."""
    if not operand.hbm_bytes:
        return 0
    users = [each for each in inside.values() if parameter.name in each.operands]
    if users and all(
        each.opcode in ("dynamic-slice", "slice", "gather") and each.operands[0] == parameter.name for each in users
    ):
        return min(operand.hbm_bytes, sum(each.bytes for each in users))
    if users and all(each.opcode == "dynamic-update-slice" and each.operands[0] == parameter.name for each in users):
        return 0
    return operand.hbm_bytes


def _split_operands(rest: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes the operands, and what follows."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _weight(runs: list[Run]) -> tuple[int, int]:
    """Products first, then bytes of results."""
    return sum(map(_flops, runs)), sum(run.times * run.instruction.bytes for run in runs if not run.fused)


def _flops(run: Run) -> int:
    return run.times * _product_flops(run.instruction, run.computation)


def _product_flops(instruction: Instruction, computation: Computation) -> int:
    if instruction.opcode == "dot":
        contracted = instruction.numbers(r"lhs_contracting_dims=\{([\d,]*)\}")
    elif instruction.opcode == "custom-call" and "dot_dimension_numbers" in instruction.attributes:
        contracted = instruction.numbers(r'"lhs_contracting_dimensions":\[([^]]*)\]')
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    else:
        return instruction.estimate("flops")
    lhs = computation[instruction.operands[0]].arrays[0]
    return 2 * instruction.arrays[0].size * math.prod(lhs.dims[i] for i in contracted)


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """TPU products are convolutions, the batched ones with windows over a dilated batch dim: only taps on real elements count."""
    lhs, rhs = (computation[name].arrays[0] for name in instruction.operands[:2])
    lhs_labels, rhs_labels, out_labels = re.split("_|->", instruction.attribute(r"dim_labels=([\w>-]+)"))
    out = instruction.arrays[0]
    taps = 1
    for axis in (label for label in out_labels if label.isdigit()):
        sizes = lhs.dims[lhs_labels.index(axis)], rhs.dims[rhs_labels.index(axis)], out.dims[out_labels.index(axis)]
        taps *= _valid_taps(*sizes, _window(instruction.attribute(r"window=\{([^}]*)\}"), int(axis)))
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    batch = lhs.dims[lhs_labels.index("b")] // batch_groups
    return 2 * taps * batch * rhs.dims[rhs_labels.index("i")] * out.dims[out_labels.index("f")]


def _window(text: str, axis: int) -> dict[str, str]:
    return {key: values.split("x")[axis] for key, values in (part.split("=") for part in text.split())}


def _valid_taps(num_inputs: int, num_taps: int, num_outputs: int, window: dict[str, str]) -> int:
    """Pairs of an output position and a tap that meet an element of the input, neither padding nor a hole of its dilation."""
    stride, base, dilation = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    if num_outputs * num_taps > 1 << 20:
        return num_outputs * num_taps
    positions = (o * stride + t * dilation - low for o in range(num_outputs) for t in range(num_taps))
    return sum(1 for p in positions if 0 <= p < (num_inputs - 1) * base + 1 and p % base == 0)
