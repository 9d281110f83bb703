"""Rotary position embedding: plain, YaRN (arXiv 2309.00071, as DeepSeek uses it) and Llama 3 frequencies."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Plain RoPE: pair i turns by position * rope_theta^(-2i/dim)."""

    rope_theta: float = 10000.0  # base of the geometric frequencies

    def __post_init__(self):
        _check_positive(self, "rope_theta")

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each pair, [dim / 2]."""
        return 1.0 / self.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)

    @property
    def table_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """What MLA's softmax scale is multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig(RopeConfig):
    """YaRN, static: short inputs see the scaled frequencies too. Field names are those of published config files."""

    factor: float = 40.0  # context extension
    original_max_position_embeddings: int = 4096  # context length before the extension
    beta_fast: float = 32.0  # pairs with more rotations than this over the original context keep their frequency
    beta_slow: float = 1.0  # pairs with fewer rotations than this are slowed by the whole factor
    mscale: float | None = None  # numerator of the cos/sin factor; needs mscale_all_dim
    mscale_all_dim: float | None = None  # squared into MLA's softmax scale
    attention_factor: float | None = None  # overrides the cos/sin factor

    def __post_init__(self):
        _check_positive(self, "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(dim)

        def boundary(rotations: float) -> float:
            period = self.original_max_position_embeddings / (2 * math.pi * rotations)
            return dim * math.log(period) / (2 * math.log(self.rope_theta))

        low = max(math.floor(boundary(self.beta_fast)), 0)
        high = min(math.ceil(boundary(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    @property
    def table_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig(RopeConfig):
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a smooth ramp between."""

    factor: float = 8.0  # context extension
    low_freq_factor: float = 1.0  # wavelengths above original length / this are stretched
    high_freq_factor: float = 4.0  # wavelengths below original length / this are kept
    original_max_position_embeddings: int = 8192  # context length before the extension

    def __post_init__(self):
        _check_positive(self, "rope_theta", "factor", "original_max_position_embeddings")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}"
            )

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(dim)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        return plain / self.factor * (1 - smooth) + plain * smooth


AnyRope = RopeConfig | YarnConfig | Llama3RopeConfig


def _check_positive(config: RopeConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be positive")


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_tables(config: AnyRope, dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, T, dim / 2] float32, the table factor applied."""
    frequencies = jnp.asarray(config.inverse_frequencies(dim), jnp.float32)
    angles_BTr = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles_BTr) * config.table_factor, jnp.sin(angles_BTr) * config.table_factor


def apply_rotary(x_BTNR: jax.Array, tables: tuple[jax.Array, jax.Array], *, interleaved: bool) -> jax.Array:
    """Rotates pairs of the last dim: (2i, 2i+1) if interleaved (DeepSeek's MLA), else (i, i + R/2) (Llama, Qwen).

    The result is half-split in both cases: queries and keys agree, and no shuffle back is needed (as transformers does for V3).
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    wide = x_BTNR.astype(jnp.promote_types(x_BTNR.dtype, jnp.float32))
    if interleaved:
        pairs = wide.reshape(*wide.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNR.dtype)
