"""The choice of keys by the lightning indexer at production shapes, whole and by its parts: time, and what stands beside it.

"select_keys" is the whole, "scores" that without the choice: each score is made, and the best of a query found. Operations are the
products with the keys that a query sees. "choice" is among scores that are there, of which all are seen, the same code on every
platform; "passes" is its time over that of reading them once, to be added, and "top_k" what JAX has, in any order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.benches.report import interleaved_seconds, report
from experiments.benches.shape_flags import ShapeFlags
from experiments.cli import parse_flags
from kernels_pallas import Mask, Unsupported
from kernels_pallas.lightning_indexer import select_keys, to_fp8, topk
from kernels_pallas.lightning_indexer.api import BACK_ENDS
from kernels_pallas.lightning_indexer.selection import Scores
from kernels_pallas.lightning_indexer.shapes import SHAPES, Shape
from kernels_pallas.lightning_indexer.tiles import TiledMask, Tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectKeysFlags(ShapeFlags):
    dtypes: tuple[Literal["float32", "bfloat16", "fp8"], ...] = ("bfloat16", "fp8")  # of index queries and keys
    max_gflop: float = 4  # leave out shapes whose scores take more operations

    @property
    def shapes(self) -> dict[str, Shape]:
        return self.keep(SHAPES, lambda shape: shape.score_flops)


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, SelectKeysFlags)
    report("select_keys", flags, list(measure(flags)))


def measure(flags: SelectKeysFlags) -> Iterator[dict[str, Any]]:
    for name, shape in flags.shapes.items():
        case = {"shape": name, "sizes": dataclasses.asdict(shape)}
        for dtype in flags.dtypes:
            for row in measure_selection(shape, dtype, flags.repeats):
                yield {**case, "dtype": dtype, **row}
        for row in measure_choice(shape, flags.repeats):
            yield {**case, "dtype": "float32", **row}


def measure_selection(shape: Shape, dtype: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per part and implementation for this platform."""
    q_key, w_key, k_key = jax.random.split(jax.random.key(0), 3)
    stored = jnp.dtype("bfloat16" if dtype == "fp8" else dtype)
    q_BTIJ = jax.random.normal(q_key, (1, shape.queries, shape.index_heads, shape.index_width), stored)
    w_BTI = jax.random.normal(w_key, (1, shape.queries, shape.index_heads))
    k_BSJ = jax.random.normal(k_key, (1, shape.keys, shape.index_width), stored)
    args = jax.jit(to_fp8)(q_BTIJ, w_BTI, k_BSJ) if dtype == "fp8" else (q_BTIJ, w_BTI, k_BSJ, None)

    runs: dict[Any, Callable] = {}
    names: tuple[Any, ...] = ("xla", *(name for name in BACK_ENDS if name == jax.default_backend()))
    for name in names:
        parts = {
            "select_keys": functools.partial(_select, shape, name),
            "scores": functools.partial(_best, shape, name),
        }
        for op, fn in parts.items():
            run = functools.partial(jax.jit(fn), *args)
            try:
                jax.block_until_ready(run())
            except Unsupported as reason:
                yield {"op": op, "implementation": name, "unsupported": str(reason)}
                continue
            runs[op, name] = run
    times: dict[Any, float] = interleaved_seconds(runs, repeats)
    for (op, name), seconds in times.items():
        yield {
            "op": op,
            "implementation": name,
            "us": 1e6 * seconds,
            "tflop_per_second": shape.score_flops / seconds / 1e12,
            "times_xla": times[op, "xla"] / seconds,
        }


def measure_choice(shape: Shape, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for the choice among scores, and one for JAX's."""
    score_BTS = jax.random.normal(jax.random.key(1), (1, shape.queries, shape.keys))
    key_BTS = jax.jit(topk.sortable)(score_BTS)
    runs = {
        "xla": functools.partial(jax.jit(functools.partial(_choose, shape)), key_BTS),
        "top_k": functools.partial(jax.jit(lambda a: jax.lax.top_k(a, shape.topk)[1]), score_BTS),
        "one pass": functools.partial(jax.jit(lambda a: jnp.sum(a, axis=-1)), key_BTS),
    }
    times = interleaved_seconds(runs, repeats)
    one_pass = times.pop("one pass")
    for name, seconds in times.items():
        yield {
            "op": "choice",
            "implementation": name,
            "us": 1e6 * seconds,
            "gb_per_second": score_BTS.nbytes / seconds / 1e9,
            "passes": seconds / one_pass,
            "times_top_k": times["top_k"] / seconds,
        }


def _select(
    shape: Shape, name: Any, q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: Any
) -> jax.Array:
    return select_keys(
        q_BTIJ, w_BTI, k_BSJ, mask=shape.mask, topk=shape.topk, k_scale_BS=k_scale_BS, implementation=name
    )


def _best(shape: Shape, name: str, *args: Any) -> jax.Array:
    """The highest score [B, T] of each query, so that all are made and none is kept."""
    scores: Scores = BACK_ENDS[name].index_scores(*args, shape.mask)
    return scores.over_blocks(lambda _, key_btS: jnp.max(key_btS, axis=-1))


def _choose(shape: Shape, key_BTS: jax.Array) -> jax.Array:
    """A block of queries at a time, as of scores that are made."""
    tiles = Tiles.of(key_BTS, key_BTS[:, 0], shape.index_heads)
    missing = tiles.padded_keys - tiles.num_keys
    key_BTS = jnp.pad(key_BTS, ((0, 0), (0, 0), (0, missing)), constant_values=topk.HIDDEN)
    scores = Scores(tiled_mask=TiledMask.of(tiles, Mask()), queries=(key_BTS,), of_block=lambda _, key_btS: key_btS)
    return scores.choose(shape.topk)
