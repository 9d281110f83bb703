"""Attention over selected keys at production shapes, forward and backward: time, operations and bytes of gathered keys a second.

Each query attends to keys of its own, one out of each of as many equal parts of the row. The backward pass is plain JAX on all
platforms.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benches.report import interleaved_seconds, report
from experiments.benches.shape_flags import ShapeFlags
from experiments.cli import parse_flags
from kernels_pallas import Unsupported, sparse_attention
from kernels_pallas.sparse_attention.api import BACK_ENDS
from kernels_pallas.sparse_attention.shapes import LATENT, SHAPES, Shape

SCALE = 192**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionFlags(ShapeFlags):
    dtype: str = "bfloat16"  # of operands

    @property
    def shapes(self) -> dict[str, Shape]:
        return self.keep(SHAPES, lambda shape: shape.forward_flops)


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, SparseAttentionFlags)
    rows = [row for name, shape in flags.shapes.items() for row in measure(name, shape, flags)]
    report("sparse_attention", flags, rows)


def measure(name: str, shape: Shape, flags: SparseAttentionFlags) -> Iterator[dict[str, Any]]:
    """One row per pass and implementation for this platform."""
    q_key, k_key, dout_key, index_key = jax.random.split(jax.random.key(0), 4)
    q_BTNK = jax.random.normal(q_key, shape.q_BTNK, flags.dtype)
    k_BSZK = jax.random.normal(k_key, shape.k_BSZK, flags.dtype)
    dout_BTNU = jax.random.normal(dout_key, shape.out_BTNU, flags.dtype)
    part = shape.keys // shape.selected
    index_BTW = part * jnp.arange(shape.selected) + jax.random.randint(index_key, shape.index_BTW, 0, part)

    case = {"shape": name, "sizes": dataclasses.asdict(shape), "dtype": flags.dtype}
    runs: dict[Any, Callable] = {}
    names: tuple[Any, ...] = ("xla", *(name for name in BACK_ENDS if name == jax.default_backend()))
    for implementation in names:
        forward = jax.jit(functools.partial(_forward, implementation))
        run = functools.partial(forward, q_BTNK, k_BSZK, index_BTW)
        try:
            jax.block_until_ready(run())
        except Unsupported as reason:
            yield {**case, "pass": "forward", "implementation": implementation, "unsupported": str(reason)}
            continue
        runs["forward", implementation] = run
    lse_BTN = runs["forward", "xla"]()[1]
    backward = functools.partial(BACK_ENDS["xla"].backward, scale=SCALE)
    delta_BTN = jnp.zeros_like(lse_BTN)
    runs["backward", "xla"] = functools.partial(
        jax.jit(backward), q_BTNK, k_BSZK, None, index_BTW, lse_BTN, dout_BTNU, delta_BTN
    )
    times: dict[Any, float] = interleaved_seconds(runs, flags.repeats)
    gathered = index_BTW.size * k_BSZK.shape[3] * k_BSZK.dtype.itemsize
    flops = {"forward": shape.forward_flops, "backward": shape.backward_flops}
    for (way, implementation), seconds in times.items():
        yield {
            **case,
            "pass": way,
            "implementation": implementation,
            "us": 1e6 * seconds,
            "tflop_per_second": flops[way] / seconds / 1e12,
            "gathered_gb_per_second": gathered / seconds / 1e9,
            "times_xla": times[way, "xla"] / seconds,
        }


def _forward(
    implementation: Any, q_BTNK: jax.Array, k_BSZK: jax.Array, index_BTW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return sparse_attention(
        q_BTNK,
        k_BSZK,
        None,
        index_BTW,
        scale=SCALE,
        value_width=LATENT,
        implementation=implementation,
        return_lse=True,
    )
