"""FP8 weights of published checkpoints: a float8_e4m3fn matrix `X.weight`, and `X.weight_scale_inv`, a factor per 128x128 block.

The two may lie in different files. Despite the name the factor is multiplied (DeepSeek-V3, section 3.3).
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from kernels_pallas.fp8 import host
from kernels_pallas.fp8.api import BLOCK
from mdl.hf.fields import Fields

DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
# Files of Qwen3 round the factors to bfloat16.
SCALE_DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16)))


def quantization_config(*, ue8m0: bool = False) -> dict[str, Any]:
    """The `quantization_config` of a config.json whose matrices are stored so; ue8m0: the factors are powers of two."""
    config = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return config | {"scale_fmt": "ue8m0"} if ue8m0 else config


def check_config(fields: Fields) -> None:
    """Refuses a `quantization_config` other than this one. Which tensors are FP8 is known from the files."""
    if not fields.has("quantization_config"):
        fields.ignore("quantization_config")
        return
    settings = fields.child("quantization_config")
    if settings.text("quant_method") != "fp8":
        raise settings.refusal("quant_method", 'only "fp8" is supported; convert other weights to bfloat16 first')
    settings.only("fmt", "e4m3")
    if settings.integers("weight_block_size") != [BLOCK, BLOCK]:
        raise settings.refusal("weight_block_size", f"only [{BLOCK}, {BLOCK}] is supported")
    # How activations would be rounded: ours are not, matrices are multiplied in the compute dtype.
    settings.only("activation_scheme", "dynamic")
    settings.only("scale_fmt", "ue8m0", "float")
    settings.only("expert_dtype", "fp8")
    for name in ("dequantize", "modules_to_convert", "modules_to_not_convert"):
        settings.ignore(name)
    settings.refuse_unread()


def scale_name(weight: str) -> str:
    return f"{weight}_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One factor per block, the last ones partial."""
    return tuple(-(-size // BLOCK) for size in shape)


def read(tensors: Mapping[str, np.ndarray], name: str, part: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """float32(FP8) * scale of a part of a matrix, rounded once to `dtype`; only that part is touched."""
    rows, cols = part
    scale = tensors[scale_name(name)]
    if scale.dtype == ml_dtypes.bfloat16:
        scale = scale.astype(np.float32)
    return host.dequantize(tensors[name], scale, dtype, rows=rows, cols=cols)
