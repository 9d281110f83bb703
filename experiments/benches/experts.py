"""Rates of the expert products, forward and backward, as a share of a dense product of the same operations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches.report import BenchFlags, interleaved_seconds, report
from experiments.cli import parse_flags
from kernels_pallas import grouped_gemm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsFlags(BenchFlags):
    rows: int = 8192  # routed rows M
    hidden_size: int = 512  # D
    intermediate_size: int = 512  # F
    experts: tuple[int, ...] = (16, 32)  # numbers of experts E
    dtype: str = "float32"  # of operands


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, ExpertsFlags)
    report(
        "experts", flags, [measure(flags, E, loads) for E in flags.experts for loads in ("equal", "routed", "skewed")]
    )


def group_sizes(rows: int, experts: int, loads: str) -> np.ndarray:
    """equal; routed: spread as an untrained router spreads them, the busiest near 1.7 x the mean; skewed: one has a quarter."""
    generator = np.random.default_rng(0)
    share = {
        "equal": np.full(experts, 1 / experts),
        "routed": generator.dirichlet(np.full(experts, 10.0)),
        "skewed": np.concatenate([[0.25], np.full(experts - 1, 0.75 / (experts - 1))]),
    }[loads]
    sizes = np.floor(share * rows).astype(np.int32)
    sizes[: rows - sizes.sum()] += 1
    return sizes


def measure(flags: ExpertsFlags, experts: int, loads: str) -> dict[str, Any]:
    M, D, F, dtype = flags.rows, flags.hidden_size, flags.intermediate_size, jnp.dtype(flags.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x_MD, w_DF = jax.random.normal(keys[0], (M, D), dtype), jax.random.normal(keys[1], (D, F), dtype)
    w_EDF = jnp.broadcast_to(w_DF, (experts, D, F)) + 0
    dy_MF = jax.random.normal(keys[2], (M, F), dtype)
    sizes = jnp.asarray(group_sizes(M, experts, loads))

    def grouped(x_MD: jax.Array, w_EDF: jax.Array) -> jax.Array:
        return grouped_gemm(x_MD, w_EDF, sizes)

    def forward_and_backward(product: Any) -> tuple[Any, Any]:
        return jax.jit(product), jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy))

    dense_forward, dense_backward = forward_and_backward(jnp.matmul)
    grouped_forward, grouped_backward = forward_and_backward(grouped)
    times = interleaved_seconds(
        {
            "dense forward": lambda: dense_forward(x_MD, w_DF),
            "grouped forward": lambda: grouped_forward(x_MD, w_EDF),
            "dense backward": lambda: dense_backward(x_MD, w_DF, dy_MF),
            "grouped backward": lambda: grouped_backward(x_MD, w_EDF, dy_MF),
        },
        flags.repeats,
    )
    flops = 2 * M * D * F
    return {
        "experts": experts,
        "loads": loads,
        "busiest_over_mean": float(sizes.max() * experts / M),
        "dense_gflops": flops / times["dense forward"] / 1e9,
        "forward_share_of_dense": times["dense forward"] / times["grouped forward"],
        "backward_share_of_dense": times["dense backward"] / times["grouped backward"],
    }
