"""Compiles kernels for chips that are not here and tabulates what the compilers say of them."""

import dataclasses
import sys
from typing import Any

import jax

from experiments.benches.report import ReportFlags, report
from experiments.cli import parse_flags
from experiments.config_tree import did_you_mean
from experiments.errors import UserError
from kernels_pallas import aot
from kernels_pallas.compile_cases import compile_cases

COLUMNS = (
    "{op:30} {shape:42} {by:6} {chip:6} {compiled:8} {registers:>9} {spills:>7} {shared:>8} {vmem:>9} {temp:>9} {bundles:>14} "
    "{seconds:>7}"
)
HEADER = COLUMNS.format(
    op="op",
    shape="shape",
    by="by",
    chip="chip",
    compiled="compiled",
    registers="registers",
    spills="spill B",
    shared="smem KiB",
    vmem="VMEM KiB",
    temp="temp KiB",
    bundles="bundles/needed",
    seconds="seconds",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotFlags(ReportFlags):
    all: bool = False  # every production shape and XLA too; else the few kernels that every run of the tests compiles
    op: str | None = None  # only ops whose name starts so, such as fp8.quantize
    contains: str = ""  # only shapes with this in their name
    chip: str | None = None  # only this one of v5e, v5p, v6e, tpu7x and h200
    bundles: bool = False  # count the instructions of TPU kernels beside those that their products need; twice as slow

    def __post_init__(self):
        if self.chip is not None and self.chip not in aot.CHIPS:
            raise UserError(
                f"--chip={self.chip}{did_you_mean(self.chip, aot.CHIPS)}: the chips are {', '.join(aot.CHIPS)}"
            )


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, AotFlags)
    jax.config.update("jax_platforms", "cpu")  # the machine's own devices are not needed, and may be in use
    if flags.bundles:
        aot.count_bundles()
    if reason := aot.unavailable():
        raise UserError(reason)
    wanted = [
        (case, chip)
        for case in compile_cases()
        for chip in case.chips
        if (flags.all or case.every_time)
        and case.op.startswith(flags.op or "")
        and flags.contains in case.shape
        and flags.chip in (None, chip.name)
    ]
    if not wanted:
        ops = ", ".join(dict.fromkeys(case.op for case in compile_cases()))
        raise UserError(f"--op={flags.op} --contains={flags.contains} leave no case; the ops are {ops}")
    print(HEADER, file=sys.stderr)
    results = []
    for case, chip in wanted:
        results.append(compile_one(case, chip))
        print(line(results[-1]), file=sys.stderr, flush=True)
    report("aot", flags, results)


def compile_one(case: aot.CompileCase, chip: aot.Chip) -> dict[str, Any]:
    said = chip.compile(case.fn, *case.args)
    return {
        "op": case.op,
        "shape": case.shape,
        "implementation": case.implementation,
        "chip": chip.name,
        "compiled": said.compiled,
        "error": said.error,
        "registers": said.registers,
        "spill_bytes": said.spill_bytes,
        "shared_memory_bytes": said.shared_memory_bytes,
        "vmem_bytes": said.vmem_bytes,
        "temp_bytes": said.temp_bytes,
        "bundles": said.bundles and dataclasses.asdict(said.bundles),
        "seconds": round(said.seconds, 2),
    }


def line(result: dict[str, Any]) -> str:
    """A row of the table; what does not exist on a chip is empty."""

    def number(name: str, unit: int = 1) -> str:
        return "" if result[name] is None else str(round(result[name] / unit))

    bundles = result["bundles"]
    row = COLUMNS.format(
        op=result["op"],
        shape=result["shape"],
        by=result["implementation"],
        chip=result["chip"],
        compiled="yes" if result["compiled"] else "no",
        registers=number("registers"),
        spills=number("spill_bytes"),
        shared=number("shared_memory_bytes", 1024),
        vmem=number("vmem_bytes", 1024),
        temp=number("temp_bytes", 1024),
        bundles="" if bundles is None else f"{bundles['scheduled']} {bundles['scheduled'] / bundles['needed']:.2f}x",
        seconds=f"{result['seconds']:.2f}",
    )
    return row if result["compiled"] else f"{row}  {result['error']}"
