"""Causal attention, forward and backward, on production shapes, beside what JAX itself has for the shape.

Operations are those of the pairs that a causal query sees: two products forward, five backward. The rivals are
`jax.nn.dot_product_attention` by XLA, while its scores fit, and on a GPU by cuDNN, with values padded to the width of keys, and
tokamax where that is installed; on a TPU splash attention.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from experiments.benches.report import interleaved_seconds, report
from experiments.benches.shape_flags import ShapeFlags
from experiments.cli import parse_flags
from kernels_pallas import Unsupported, flash_attention
from kernels_pallas.flash_attention.api import BACK_ENDS
from kernels_pallas.flash_attention.shapes import SHAPES, Shape

MAX_SCORES = 1 << 31  # of a rival that holds them all


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttentionFlags(ShapeFlags):
    dtype: str = "float32"  # of operands

    @property
    def shapes(self) -> dict[str, Shape]:
        return self.keep(SHAPES, lambda shape: shape.forward_flops)


def main(argv: list[str]) -> None:
    flags = parse_flags(argv, FlashAttentionFlags)
    report("flash_attention", flags, [measure(name, shape, flags) for name, shape in flags.shapes.items()])


def measure(name: str, shape: Shape, flags: FlashAttentionFlags) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (shape.q_BTNK, shape.k_BSZK, shape.v_BSZU, (*shape.q_BTNK[:3], shape.v_width))
    *operands, dout = (jax.random.normal(key, size, flags.dtype) for key, size in zip(keys, sizes, strict=True))
    runs, declined = {}, {}
    for who, op in _candidates(shape).items():
        forward, backward = jax.jit(op), jax.jit(lambda vjp, dout: vjp(dout))
        try:
            _, vjp = jax.jit(functools.partial(jax.vjp, op))(*operands)
            runs[who, "forward"] = functools.partial(forward, *operands)
            runs[who, "backward"] = functools.partial(backward, vjp, dout)
        except (Unsupported, NotImplementedError, RuntimeError, ValueError) as reason:  # rivals decline in many ways
            declined[who] = str(reason).splitlines()[0]
    times = interleaved_seconds(runs, flags.repeats)
    return {
        "shape": name,
        "sizes": dataclasses.asdict(shape),
        **{who: _rates(shape, times, who) for who in dict.fromkeys(who for who, _ in runs)},
        "declined": declined,
    }


def _rates(shape: Shape, times: dict[Any, float], who: str) -> dict[str, float]:
    """Milliseconds, GFLOP/s, query tokens/s, and times the speed of the fastest rival."""
    found = {}
    for way, flops in (("forward", shape.forward_flops), ("backward", shape.backward_flops)):
        mine = times[who, way]
        rivals = [time for (other, of), time in times.items() if of == way and other not in BACK_ENDS]
        found |= {
            f"{way}_ms": 1000 * mine,
            f"{way}_gflops": flops / mine / 1e9,
            f"{way}_tokens_per_second": shape.batch * shape.queries / mine,
        }
        if rivals and who in BACK_ENDS:
            found[f"{way}_speed_over_best_rival"] = min(rivals) / mine
    return found


def _candidates(shape: Shape) -> dict[str, Callable]:
    scale, causal = shape.qk_width**-0.5, shape.queries > 1

    def rival(implementation: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, shape.qk_width - shape.v_width)))
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation=implementation)
        return out[..., : shape.v_width]

    def own(implementation: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, scale=scale, mask=shape.mask, implementation=implementation)

    names = ("xla", *(name for name in BACK_ENDS if name == jax.default_backend()))
    ours = {name: functools.partial(own, name) for name in names}
    num_keys = shape.k_BSZK[1]
    if causal and shape.queries != num_keys:
        return ours  # JAX aligns causal queries with the first keys
    if math.prod((shape.batch, shape.heads, shape.queries, num_keys)) <= MAX_SCORES and shape.qk_width == shape.v_width:
        ours["jax xla"] = functools.partial(rival, "xla")
    if jax.default_backend() == "gpu":
        ours["jax cudnn"] = functools.partial(rival, "cudnn")
        if importlib.util.find_spec("tokamax"):
            ours["tokamax"] = functools.partial(_tokamax, scale, causal)
    if jax.default_backend() == "tpu":
        ours["splash"] = functools.partial(_splash, scale, causal)
    return ours


def _tokamax(scale: float, causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    tokamax = importlib.import_module("tokamax")  # no dependency of ours
    return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="mosaic")


def _splash(scale: float, causal: bool, q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array) -> jax.Array:
    """With the large blocks and the fused backward pass that its users choose; the scale is rounded into q, as there."""
    (num_queries, heads), num_keys = q_BTNK.shape[1:3], k_BSZK.shape[1]
    rows, columns = min(1024, num_queries), min(1024, num_keys)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=min(512, columns),
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=min(512, columns),
        use_fused_bwd_kernel=True,
    )
    kind = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    masks = splash_attention_mask.MultiHeadMask([kind((num_queries, num_keys))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(masks, block_sizes=blocks)
    out_BNTU = jax.vmap(kernel)(*(a.swapaxes(1, 2) for a in (q_BTNK * scale, k_BSZK, v_BSZU)))
    return out_BNTU.swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
