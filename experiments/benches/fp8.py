"""Times of the FP8 formats on production shapes, as a share of what a copy of as many bytes takes in the same turns.

Bytes are those that must move: what an op is given plus what it returns, each once. Every call allocates its result, the copies
too. Shapes of a few MB run from cache.
"""

import concurrent.futures
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches.report import BenchFlags, report, seconds
from experiments.cli import parse_flags
from experiments.errors import UserError
from kernels_pallas import Unsupported, fp8
from kernels_pallas.fp8 import api, host, shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Flags(BenchFlags):
    dtype: str = "bfloat16"  # of what is quantized, and of what dequantize gives
    ue8m0: bool = False  # scales that are powers of two
    max_elements: int | None = None  # leave out larger shapes
    calls: int = 1  # in a row per repetition; more of them hide the dispatch of short kernels on accelerators
    host_threads: tuple[int, ...] = (1, 2)  # threads of the NumPy twins, all on one weight

    def __post_init__(self):
        super().__post_init__()
        if not any(cases(self)):
            raise UserError(
                f"--max_elements={self.max_elements} leaves no shape; the smallest has {min(_sizes())} elements"
            )


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, Fp8Flags)
    report("fp8", flags, [*measure_ops(flags), *measure_host(flags)])


def measure_ops(flags: Fp8Flags) -> Iterator[dict[str, Any]]:
    """One row per op, shape and implementation that is for this platform."""
    for op, name, shape in cases(flags):
        x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(flags.dtype))
        quantize = fp8.quantize_activations if op.endswith("activations") else fp8.quantize_weights
        quantize = functools.partial(quantize, ue8m0=flags.ue8m0)
        if op.startswith("dequantize"):
            run, argument = functools.partial(fp8.dequantize, dtype=x.dtype), jax.jit(quantize)(x)
        else:
            run, argument = quantize, x
        num_bytes = _num_bytes(argument) + _num_bytes(jax.eval_shape(run, argument))
        copied = jnp.zeros(num_bytes // 2, jnp.uint8)
        runs = {"copy": _repeat(jax.jit(jnp.copy), copied, flags.calls)}
        declined = {}
        for implementation in ("xla", *(name for name in api.BACK_ENDS if name == jax.default_backend())):
            jitted = jax.jit(functools.partial(run, implementation=implementation))
            try:
                jax.block_until_ready(jitted(argument))
            except Unsupported as reason:
                declined[implementation] = str(reason)
                continue
            runs[implementation] = _repeat(jitted, argument, flags.calls)
        times = _turns(runs, flags.repeats)
        case = {"op": op, "name": name, "shape": shape, "dtype": flags.dtype, "ue8m0": flags.ue8m0}
        for implementation in list(runs)[1:]:
            yield {**case, "implementation": implementation, **_rates(times, implementation, num_bytes, flags.calls)}
        for implementation, reason in declined.items():
            yield {**case, "implementation": implementation, "unsupported": reason}


def measure_host(flags: Fp8Flags) -> Iterator[dict[str, Any]]:
    """The NumPy twins against NumPy's copy, by number of threads."""
    weights = [(name, shape) for op, name, shape in cases(flags) if op == "quantize_weights"]
    if not weights:
        return
    name, shape = max(weights, key=lambda weight: math.prod(weight[1]))
    w_MN = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.dtype(flags.dtype)))
    data_MN, scale = host.quantize(w_MN, ue8m0=flags.ue8m0)
    num_bytes = w_MN.nbytes + data_MN.nbytes + scale.nbytes
    copied = np.ones(num_bytes // 2, np.uint8)
    for threads in flags.host_threads:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:

            def on_threads(run: Callable, pool=pool, threads=threads) -> Callable:
                return lambda: [future.result() for future in [pool.submit(run) for _ in range(threads)]]

            runs = {
                "copy": on_threads(copied.copy),
                "quantize_weights": on_threads(lambda: host.quantize(w_MN, ue8m0=flags.ue8m0)),
                "dequantize_weights": on_threads(lambda: host.dequantize(data_MN, scale, w_MN.dtype)),
            }
            times = _turns(runs, flags.repeats)
        for op in list(runs)[1:]:
            case = {"op": op, "name": name, "shape": shape, "dtype": flags.dtype, "ue8m0": flags.ue8m0}
            yield {**case, "implementation": "host", "threads": threads, **_rates(times, op, threads * num_bytes, 1)}


def cases(flags: Fp8Flags) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(op, name of the shape, shape)"""
    for kind, table in (("activations", shapes.ACTIVATIONS), ("weights", shapes.WEIGHTS)):
        for name, shape in table.items():
            if flags.max_elements is None or math.prod(shape) <= flags.max_elements:
                yield f"quantize_{kind}", name, shape
                yield f"dequantize_{kind}", name, shape


def _sizes() -> list[int]:
    return [math.prod(shape) for shape in (*shapes.ACTIVATIONS.values(), *shapes.WEIGHTS.values())]


def _repeat(run: Callable, argument: Any, calls: int) -> Callable:
    return lambda: [run(argument) for _ in range(calls)]


def _turns(runs: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Wall times of each, one after the other in every turn, so that noise of the machine meets all of them alike."""
    for run in runs.values():
        seconds(run, 1)
    turns = [{name: seconds(run, 1, warmups=0)[0] for name, run in runs.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in runs}


def _rates(times: dict[str, list[float]], name: str, num_bytes: int, calls: int) -> dict[str, float]:
    """Ratios are medians over turns."""

    def ratio(to: str) -> float:
        return statistics.median(other / own for other, own in zip(times[to], times[name], strict=True))

    median = statistics.median(times[name]) / calls
    rates = {"us": 1e6 * median, "gb_per_second": num_bytes / median / 1e9, "share_of_copy": ratio("copy")}
    return rates | ({"times_xla": ratio("xla")} if "xla" in times else {})


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
