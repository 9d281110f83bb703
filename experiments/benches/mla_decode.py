"""Decoding attention over latents at production shapes: time, bytes of cache read a second, and the plain products beside it.

"plain" is two einsums over the whole cache with a softmax between, without blocks or lengths beyond a mask. Bytes are those of the
entries that the rows hold, each once.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.benches.report import BenchFlags, report, seconds
from experiments.cli import parse_flags
from experiments.errors import UserError
from kernels_pallas import Unsupported
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, mla_decode
from kernels_pallas.mla_decode.api import BACK_ENDS
from kernels_pallas.mla_decode.shapes import LATENT, ROPE, SHAPES, Shape, page

SCALE = 192**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaDecodeFlags(BenchFlags):
    dtype: str = "bfloat16"  # of queries and cache
    storage: tuple[Literal["contiguous", "paged", "fp8"], ...] = ("contiguous", "paged", "fp8")  # kinds of cache
    splits: tuple[int | None, ...] = (None,)  # numbers of parts; none leaves it to the implementation
    max_slots: int | None = None  # leave out shapes whose caches hold more tokens in all
    plain: bool = True  # measure the plain products too; they hold all scores

    def __post_init__(self):
        super().__post_init__()
        if not shapes(self):
            raise UserError(
                f"--max_slots={self.max_slots} leaves no shape; the smallest has {min(map(slots, SHAPES.values()))}"
            )


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, MlaDecodeFlags)
    report("mla_decode", flags, list(measure(flags)))


def slots(shape: Shape) -> int:
    return shape.batch * (shape.capacity or shape.length)


def shapes(flags: MlaDecodeFlags) -> dict[str, Shape]:
    return {n: s for n, s in SHAPES.items() if flags.max_slots is None or slots(s) <= flags.max_slots}


def measure(flags: MlaDecodeFlags) -> Iterator[dict[str, Any]]:
    for name, shape in shapes(flags).items():
        for storage in flags.storage:
            yield from measure_shape(flags, name, shape, storage)


def measure_shape(flags: MlaDecodeFlags, name: str, shape: Shape, storage: str) -> Iterator[dict[str, Any]]:
    """One row per implementation for this platform and number of splits."""
    dtype = jnp.dtype(flags.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    rows = shape.batch, shape.capacity or shape.length
    latent, rope = (jax.random.normal(k, (*rows, w), dtype) for k, w in zip(keys, (LATENT, ROPE), strict=False))
    q_latent, q_rope = (
        jax.random.normal(k, (shape.batch, shape.queries, shape.heads, w), dtype)
        for k, w in zip(keys[2:], (LATENT, ROPE), strict=True)
    )
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)
    cache, bytes_per_slot = stored(storage, latent, rope)
    num_bytes = shape.batch * shape.length * bytes_per_slot
    flops = 2 * shape.batch * shape.queries * shape.heads * shape.length * (2 * LATENT + ROPE)

    runs: dict[Any, Callable] = {}
    if flags.plain:
        contiguous = LatentCache(latent, rope)
        runs["plain", None] = functools.partial(jax.jit(plain), q_latent, q_rope, contiguous, lengths)
    implementations: tuple[Any, ...] = ("xla", *(i for i in BACK_ENDS if i == jax.default_backend()))
    for implementation in implementations:
        for splits in flags.splits:
            run = jax.jit(functools.partial(mla_decode, scale=SCALE, splits=splits, implementation=implementation))
            run = functools.partial(run, q_latent, q_rope, cache, lengths)
            try:
                jax.block_until_ready(run())
            except Unsupported as reason:
                yield {"shape": name, "storage": storage, "implementation": implementation, "unsupported": str(reason)}
                continue
            runs[implementation, splits] = run
    for run in runs.values():
        seconds(run, 1)
    # In turns, so that noise of the machine meets all of them alike.
    turns = [{key: seconds(run, 1, warmups=0)[0] for key, run in runs.items()} for _ in range(flags.repeats)]
    for key in runs:
        median = statistics.median(turn[key] for turn in turns)
        row = {
            "shape": name,
            "sizes": dataclasses.asdict(shape),
            "storage": "contiguous" if key[0] == "plain" else storage,
            "dtype": flags.dtype,
            "implementation": key[0],
            "splits": key[1],
            "us": 1e6 * median,
            "gb_per_second": num_bytes / median / 1e9,
            "tflop_per_second": flops / median / 1e12,
        }
        if flags.plain:
            row["times_plain"] = statistics.median(turn["plain", None] / turn[key] for turn in turns)
        yield row


def stored(storage: str, latent: jax.Array, rope: jax.Array) -> tuple[LatentCache | Fp8LatentCache, int]:
    """The cache and its bytes per token."""
    if storage == "fp8":
        packed = jax.jit(Fp8LatentCache.pack)(latent, rope)
        return packed, packed.rows.shape[-1]
    cache, width = LatentCache(latent, rope), (LATENT + ROPE) * latent.dtype.itemsize
    if storage == "contiguous":
        return cache, width
    (batch, length), slots_of_page = latent.shape[:2], page(jax.default_backend())
    if length % slots_of_page:
        raise UserError(f"{length} slots are not whole pages of {slots_of_page}")
    pages = batch * length // slots_of_page
    shuffled = jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32)
    latent, rope = (a.reshape(pages, slots_of_page, -1)[jnp.argsort(shuffled)] for a in (latent, rope))
    return LatentCache(latent, rope, shuffled.reshape(batch, -1)), width


def plain(q_latent_BTNC: jax.Array, q_rope_BTNR: jax.Array, cache: LatentCache, lengths_B: jax.Array) -> jax.Array:
    T, S = q_latent_BTNC.shape[1], cache.latent.shape[1]
    s_BTNS = jnp.einsum("BTNC,BSC->BTNS", q_latent_BTNC, cache.latent, preferred_element_type=jnp.float32)
    s_BTNS += jnp.einsum("BTNR,BSR->BTNS", q_rope_BTNR, cache.rope, preferred_element_type=jnp.float32)
    end_BT = lengths_B[:, None] - T + 1 + jnp.arange(T)
    s_BTNS = jnp.where((jnp.arange(S) < end_BT[..., None])[:, :, None], SCALE * s_BTNS, -jnp.inf)
    p_BTNS = jax.nn.softmax(s_BTNS, axis=-1).astype(cache.latent.dtype)
    return jnp.einsum("BTNS,BSC->BTNC", p_BTNS, cache.latent, preferred_element_type=jnp.float32)
