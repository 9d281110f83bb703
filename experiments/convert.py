"""Converts checkpoints from and to Hugging Face, in streams, on CPUs.

    python -m experiments.convert --from=path/to/DeepSeek-V3 --to=v3
    python -m experiments.convert --from=path/to/DeepSeek-V3 --to=v3_bf16 --dtype=bf16
    python -m experiments.convert --from=runs/tiny --to=tiny_hf

The direction is read from what --from holds:
  a run of ours, its checkpoints or one step of them  ->  Hugging Face
  Hugging Face                                        ->  our format, a directory that looks like a run with step 0
  Hugging Face, with --fp8                            ->  Hugging Face, matrices in FP8 with weight_scale_inv
  Hugging Face in FP8, with --dtype=bf16 or f32       ->  Hugging Face, dequantized
and --to_format=hf or ours has the last word. What is there is never overwritten. After Ctrl-C or a kill the same command
goes on where it was; until it is done, everything lies in <to>.converting.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from typing import Literal

from experiments.cli import parse_flags, run_main
from experiments.errors import UserError
from experiments.paths import local_path

_MEMORY = 400_000_000  # bytes that pieces under way may hold, beside as much as the largest tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFlags:
    from_: str  # Hugging Face directory, run directory, its checkpoints, or one step of a run
    to: str  # new directory
    dtype: Literal["bf16", "f32", "keep"] = (
        "keep"  # of parameters (a router's bias keeps its own); keep: as they are, FP8 too
    )
    fp8: bool = False  # write the matrices of attention, MLPs and experts as FP8 with weight_scale_inv
    ue8m0: bool = False  # with --fp8: scales are powers of two
    ema: bool = False  # take the averaged parameters of the run
    to_format: Literal["hf", "ours"] | None = (
        None  # what to write; none: hf from a run, with --fp8, or with --dtype from FP8 files, else ours
    )
    max_shard_bytes: int = 5_000_000_000  # of one safetensors file
    num_processes: int = 1  # processes that share the work, on machines that all see --from and --to
    process_id: int = 0  # this process, from 0

    def __post_init__(self):
        if self.ue8m0 and not self.fp8:
            raise ValueError("--ue8m0 belongs to --fp8; give both")
        if self.max_shard_bytes < 1:
            raise ValueError(f"--max_shard_bytes={self.max_shard_bytes}: must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"--process_id={self.process_id}: must be between 0 and num_processes - 1")
        for name, value in (("from", self.from_), ("to", self.to)):
            if "://" in value:
                raise ValueError(f"--{name}={value}: only directories of a mounted file system are supported")


def main(argv: list[str]) -> int:
    """Converts, verifies, and prints what it took as JSON. Returns 130 or 143 after Ctrl-C and SIGTERM."""
    flags = parse_flags(argv, ConvertFlags)
    with _signals_raise():
        try:
            return _convert(flags)
        except KeyboardInterrupt as interrupt:
            code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return code
        except OSError as error:
            raise UserError(f"{error}; when that is mended, the same command goes on from here") from error


def _convert(flags: ConvertFlags) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the shapes of a model are asked for, nothing is computed
    from experiments.conversion import work
    from experiments.conversion.journal import Journal, Workspace
    from experiments.conversion.meter import Meter, format_bytes
    from experiments.conversion.recast import Recast
    from experiments.conversion.request import DTYPES, SOURCE_FILES, Request, plan

    source, to = local_path(flags.from_, "--from"), local_path(flags.to, "--to")
    if not source.is_dir():
        raise UserError(f"--from={source}: no such directory")
    workspace = Workspace(to)
    if workspace.is_complete():
        workspace.remove()
        print(f"{to} is complete")
        return 0
    workspace.check_free()
    recast = Recast(dtype=DTYPES[flags.dtype], quantizes=flags.fp8, ue8m0=flags.ue8m0)
    request = Request(
        directory=source,
        recast=recast,
        to_format=flags.to_format,
        ema=flags.ema,
        max_shard_bytes=flags.max_shard_bytes,
    )
    planned = plan(request, workspace.result)
    units = planned.target.units
    total = sum(unit.num_bytes for unit in units)
    print(f"{planned.says}: {format_bytes(total)} in {len(units)} files", flush=True)
    _check_space(to, total - workspace.size())
    workspace.open(planned.identity)

    start = time.monotonic()
    with Journal(workspace, flags.process_id) as journal:
        mine = list(work.share(units, flags.process_id, flags.num_processes))
        size, memory = sum(unit.num_bytes for unit in mine), _MEMORY + planned.largest
        say = functools.partial(print, flush=True)
        done = sum(unit.num_bytes for unit in mine if unit.name in journal.sums)
        if done:
            say(f"going on: {format_bytes(done)} of {format_bytes(size)} are there")
        meter = Meter(size, done, say)
        work.carry_out(mine, journal, meter, memory)
        journal.reload()
        complete = all(unit.name in journal.sums for unit in units)
        if complete:
            if planned.source.fingerprint() != planned.identity[SOURCE_FILES]:
                raise UserError(
                    f"--from={source}: its files were changed meanwhile; delete {workspace.path} and begin anew"
                )
            with workspace.finishing() as is_mine:
                if is_mine:
                    planned.target.finish([journal.sums[unit.name] for unit in units])
    seconds = time.monotonic() - start
    print(
        json.dumps(
            {
                "bytes": meter.moved,
                "seconds": round(seconds, 3),
                "bytes_per_second": round(meter.moved / seconds),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "complete": complete,
            }
        )
    )
    if not complete:
        print(f"this share is done; {to} appears when the other processes are", file=sys.stderr)
    return 0


def _check_space(to: pathlib.Path, needed: int) -> None:
    from experiments.conversion.meter import format_bytes

    there = next(path for path in to.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"--to={to}: needs {format_bytes(needed)}, the disk has {format_bytes(free)} left")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does; a second signal ends the process at once."""

    def once(number, frame):
        signal.signal(number, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_main(main)
