"""Which dtype each part of the computation uses; nothing is decided at import time."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

Float = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    param: Float = "float32"  # dtype in which parameters are stored and updated
    compute: Float = "bfloat16"  # dtype of activations and matrix-product operands
    accumulation: Float = "float32"  # dtype in which dense matrix products accumulate; kernels always take float32
    logits: Float = "float32"  # dtype of logits when scoring and sampling; the training loss is always float32

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.accumulation)
