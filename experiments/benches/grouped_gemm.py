"""The grouped products on production shapes, each alone, at equal, routed and skewed loads: times, and rates as a share of dense.

"dense" is one matrix product of as many operations in the same turns; "ragged_dot" is `jax.lax.ragged_dot` and its gradients. The
FP8 products of the same shapes (values and scales given, results in bfloat16) stand beside the same dense product.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benches.experts import group_sizes
from experiments.benches.report import interleaved_seconds, report
from experiments.benches.shape_flags import ShapeFlags
from experiments.cli import parse_flags
from kernels_pallas import Unsupported, fp8
from kernels_pallas.fp8_gemm import fp8_grouped_gemm
from kernels_pallas.grouped_gemm.api import BACK_ENDS
from kernels_pallas.grouped_gemm.shapes import SHAPES, Shape

LOADS = ("equal", "routed", "skewed")
Runs = dict[Any, Callable]  # by (product, who)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedGemmFlags(ShapeFlags):
    dtype: str = "bfloat16"  # of operands
    max_gflop: float = 2500  # leave out shapes that take more operations a product
    ragged_dot: bool = True  # measure it too; outside TPUs it multiplies every row by every matrix
    fp8: bool = True  # measure the FP8 products too

    @property
    def shapes(self) -> dict[str, Shape]:
        return self.keep(SHAPES, lambda shape: shape.flops)


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, GroupedGemmFlags)
    rows = [
        row for name, shape in flags.shapes.items() for loads in LOADS for row in measure(name, shape, loads, flags)
    ]
    report("grouped_gemm", flags, rows)


def measure(name: str, shape: Shape, loads: str, flags: GroupedGemmFlags) -> list[dict[str, Any]]:
    """One row per product and who computes it."""
    sizes = group_sizes(shape.rows, shape.groups, loads)
    keys, dtype = jax.random.split(jax.random.key(0), 3), jnp.dtype(flags.dtype)
    x_MD, w_EDF, dy_MF = (
        jax.random.normal(key, a, dtype) for key, a in zip(keys, (shape.x_MD, shape.w_EDF, shape.y_MF), strict=True)
    )
    runs, declined = candidates(x_MD, w_EDF, dy_MF, jnp.asarray(sizes), flags)
    times: dict[Any, float] = interleaved_seconds(runs, flags.repeats)
    case = {
        "shape": name,
        "sizes": dataclasses.asdict(shape),
        "loads": loads,
        "busiest_over_mean": float(sizes.max() * shape.groups / shape.rows),
        "dtype": flags.dtype,
    }
    measured = [
        {
            **case,
            "product": product,
            "implementation": who,
            "us": 1e6 * times[product, who],
            "tflop_per_second": shape.flops / times[product, who] / 1e12,
            "share_of_dense": times[product.removeprefix("fp8 "), "dense"] / times[product, who],
        }
        for product, who in runs
    ]
    return [
        *measured,
        *({**case, "product": p, "implementation": who, "unsupported": why} for (p, who), why in declined.items()),
    ]


def candidates(
    x_MD: jax.Array, w_EDF: jax.Array, dy_MF: jax.Array, sizes_E: jax.Array, flags: GroupedGemmFlags
) -> tuple[Runs, dict[tuple[str, str], str]]:
    """What to time, and what was declined with which words."""
    runs: Runs = {}
    declined: dict[tuple[str, str], str] = {}

    def add(product: str, who: str, fn: Callable, *args: Any) -> None:
        run = functools.partial(jax.jit(fn), *args)
        try:
            jax.block_until_ready(run())
            runs[product, who] = run
        except Unsupported as reason:
            declined[product, who] = str(reason)

    def add_with_gradients(who: str, product: Callable, w: jax.Array) -> None:
        add("forward", who, product, x_MD, w)
        add("backward, rows", who, lambda w, dy: jax.vjp(lambda x: product(x, w), x_MD)[1](dy), w, dy_MF)
        add("backward, weights", who, lambda x, dy: jax.vjp(lambda w: product(x, w), w)[1](dy), x_MD, dy_MF)

    add_with_gradients("dense", jnp.matmul, w_EDF[0])
    if flags.ragged_dot:
        add_with_gradients("ragged_dot", lambda x, w: jax.lax.ragged_dot(x, w, sizes_E), w_EDF)
    ours: tuple[Any, ...] = ("xla", *(name for name in BACK_ENDS if name == jax.default_backend()))
    for who in ours:
        back_end = BACK_ENDS[who]
        weights = functools.partial(back_end.backward_weights, dtype=w_EDF.dtype)
        add("forward", who, back_end.forward, x_MD, w_EDF, sizes_E)
        add("backward, rows", who, back_end.backward_rows, dy_MF, w_EDF, sizes_E)
        add("backward, weights", who, weights, x_MD, dy_MF, sizes_E)
    if flags.fp8:
        x, w = jax.jit(fp8.quantize_activations)(x_MD), jax.jit(fp8.quantize_weights)(w_EDF.swapaxes(1, 2))
        for who in ours:
            add("fp8 forward", who, functools.partial(fp8_grouped_gemm, implementation=who), x, w, sizes_E)
    return runs, declined
