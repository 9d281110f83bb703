"""The public decoding attention."""

import math
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.mla_decode import reference, xla
from kernels_pallas.mla_decode.cache import AnyCache, capacity
from kernels_pallas.select import LazyModule, attempt
from kernels_pallas.vary import vary_alike

Implementation = Literal["xla", "reference", "tpu", "gpu"]
# A back end is a module with `decode(q_latent_BTNC, q_rope_BTNR, cache, lengths_B, scale, splits) -> (out_BTNC, lse_BTN)`, which
# raises Unsupported to decline a call; the first is the default.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "reference": reference,
    "tpu": LazyModule("kernels_pallas.mla_decode.tpu"),
    "gpu": LazyModule("kernels_pallas.mla_decode.gpu"),
}


def mla_decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: AnyCache,
    lengths_B: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the last T tokens of each row over its cache, keys and values being the same latents (absorbed MLA).

    s = scale * (q_latent · latent + q_rope · rope), p = softmax over the positions that a query sees, out = p · latent; V2 report
    (arXiv 2405.04434), section 2.1.2. Row b holds lengths_B[b] tokens, the T queried ones included: query t sees the positions up
    to lengths_B[b] - T + t. Tokens that were drafted and rejected need no clean-up, a smaller length next time forgets them. A
    query that sees nothing gives zeros and lse = -inf; a length beyond the capacity sees all there is.

    splits: parts of the cache whose attention is computed apart and joined by logsumexp, for devices that a few rows do not
    fill; None leaves it to the implementation. Returns out [B, T, N, C] in the queries' dtype and lse [B, T, N] in float32;
    float32 softmax and accumulation. Not differentiable.

    Raises ValueError on what does not fit together, Unsupported on an implementation that cannot do the call, and TypeError when
    differentiated.
    """
    _check(q_latent_BTNC, q_rope_BTNR, cache, lengths_B, scale, splits)

    @jax.custom_jvp
    def run(*args):
        decode = lambda back_end: back_end.decode(*args, scale, splits)  # noqa: E731
        out_BTNC, lse_BTN = attempt("mla_decode", implementation, BACK_ENDS, decode)
        return out_BTNC.astype(q_latent_BTNC.dtype), lse_BTN

    @run.defjvp
    def refuse(primals, tangents):
        raise TypeError("mla_decode is not differentiable; train with expanded keys and values (flash_attention)")

    return run(*vary_alike((q_latent_BTNC, q_rope_BTNR, cache, lengths_B)))


def _check(q_latent_BTNC, q_rope_BTNR, cache: AnyCache, lengths_B, scale, splits) -> None:
    queries = f"queries {list(q_latent_BTNC.shape)} and {list(q_rope_BTNR.shape)}"
    if q_latent_BTNC.ndim != 4 or q_rope_BTNR.ndim != 4 or q_latent_BTNC.shape[:3] != q_rope_BTNR.shape[:3]:
        raise ValueError(f"mla_decode needs queries [B, T, N, C] and [B, T, N, R], got {queries}")
    if q_latent_BTNC.dtype != q_rope_BTNR.dtype or q_latent_BTNC.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"mla_decode needs queries in float32 or bfloat16, got {q_latent_BTNC.dtype} and {q_rope_BTNR.dtype}"
        )
    batch, num_queries, _, latent_width = q_latent_BTNC.shape
    table = cache.page_table_BP
    leading = {a.shape[:2] for a in cache.arrays}
    if any(a.ndim != 3 for a in cache.arrays) or len(leading) != 1:
        raise ValueError(
            f"mla_decode needs a cache of one [rows, slots, width] or [pages, slots, width], got {cache.widths}"
        )
    if not cache.fits(latent_width, q_rope_BTNR.shape[-1]):
        raise ValueError(f"mla_decode: {queries} do not fit a cache of {cache.widths}")
    if table is None and cache.arrays[0].shape[0] != batch:
        raise ValueError(f"mla_decode: {queries}, but a cache of {cache.widths} has other rows")
    if table is not None and not (
        table.ndim == 2 and table.shape[0] == batch and jnp.issubdtype(table.dtype, jnp.signedinteger)
    ):
        raise ValueError(f"mla_decode needs a page table int32 [{batch}, P], got {table.dtype} {list(table.shape)}")
    if 0 in (*q_latent_BTNC.shape, q_rope_BTNR.shape[-1], capacity(cache)):
        raise ValueError(f"mla_decode: an empty dim in {queries} or a cache of {cache.widths}")
    if num_queries > capacity(cache):
        raise ValueError(
            f"mla_decode: {num_queries} new tokens cannot have been written to a cache of {capacity(cache)} positions; "
            "make it longer"
        )
    if lengths_B.shape != (batch,) or not jnp.issubdtype(lengths_B.dtype, jnp.signedinteger):
        raise ValueError(f"mla_decode needs lengths int32 [{batch}], got {lengths_B.dtype} {list(lengths_B.shape)}")
    if not math.isfinite(scale):
        raise ValueError(f"mla_decode: scale={scale} is not finite")
    if splits is not None and splits < 1:
        raise ValueError(f"mla_decode: splits={splits} must be at least 1; None leaves it to the implementation")
