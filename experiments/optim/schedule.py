"""Learning-rate schedules, and other numbers that change during a run, as functions of the step and of the tokens seen.

A Schedule takes `step`, the number of updates made so far (0 at the first one), and `tokens`, the training tokens seen
so far; both may be traced. Tokens come as float32 from the host's exact count: int32 ends at 2.1e9, and a sum kept in
float32 on the device would stop growing. Configs state durations as fractions of the run, so that a schedule stretches
with `num_steps`; DeepSeek-V3's is stated in steps and tokens, as published.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.errors import UserError

Schedule = Callable[[jax.Array | int, jax.Array | float], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantConfig:
    warmup_steps: int = 0  # linear warm-up from zero

    def __post_init__(self):
        _check_not_negative(self, "warmup_steps")

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Warm-up, then the peak for good."""
        warmup = _warmup_steps(self.warmup_steps, 0.0, num_steps)
        return lambda step, tokens: peak * _warmup(step, warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WsdConfig:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395); the 1 - sqrt decay is that of arXiv:2405.18392."""

    warmup_fraction: float = 0.02  # share of the steps that warm up linearly
    warmup_steps: int | None = None  # warm-up in steps, instead of the fraction
    decay_fraction: float = 0.2  # share of the steps, at the end, that decay
    decay_power: float = 0.5  # the rate falls as 1 - progress**power: 0.5 is 1 - sqrt, 1 is linear
    final_fraction: float = 0.0  # rate that the decay ends at, as a share of the peak

    def __post_init__(self):
        _check_fractions(self, "warmup_fraction", "decay_fraction", "final_fraction")
        _check_not_negative(self, "warmup_steps")
        if self.decay_power <= 0:
            raise UserError(f"decay_power={self.decay_power} must be positive (0.5: 1 - sqrt, 1: linear)")

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Warm-up, the peak, then the decay over the last steps. UserError if warm-up and decay overlap."""
        warmup = _warmup_steps(self.warmup_steps, self.warmup_fraction, num_steps)
        decay = round(self.decay_fraction * num_steps)
        if warmup + decay > num_steps:
            raise UserError(
                f"optim.schedule: {warmup} warm-up steps and decay_fraction={self.decay_fraction} ({decay} steps) "
                f"do not fit into num_steps={num_steps}; lower one of them"
            )

        def rate(step, tokens):
            progress = jnp.clip((_float(step) - (num_steps - decay)) / max(decay, 1), 0.0, 1.0)
            fall = (1.0 - self.final_fraction) * progress**self.decay_power
            return peak * _warmup(step, warmup) * (1.0 - fall)

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineConfig:
    """Half a cosine from the peak to a floor (arXiv:1608.03983, without restarts)."""

    warmup_fraction: float = 0.02  # share of the steps that warm up linearly
    warmup_steps: int | None = None  # warm-up in steps, instead of the fraction
    final_fraction: float = 0.1  # rate at the end, as a share of the peak

    def __post_init__(self):
        _check_fractions(self, "warmup_fraction", "final_fraction")
        _check_not_negative(self, "warmup_steps")

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Warm-up, then the cosine over all remaining steps."""
        warmup = _warmup_steps(self.warmup_steps, self.warmup_fraction, num_steps)
        floor = peak * self.final_fraction

        def rate(step, tokens):
            progress = (_float(step) - warmup) / max(num_steps - warmup, 1)
            return jnp.minimum(peak * _warmup(step, warmup), _cosine(peak, floor, progress))

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV3ScheduleConfig:
    """DeepSeek-V3 (report, section 4.2): warm-up by steps, then everything by tokens, at any length of the run."""

    warmup_steps: int = 2000  # linear warm-up from zero
    constant_tokens: float = 10e12  # tokens until which the peak is held
    decay_tokens: float = 4.3e12  # tokens over which a cosine leads to decayed_rate
    decayed_rate: float = 2.2e-5  # rate after the cosine
    hold_tokens: float = 333e9  # tokens for which decayed_rate is held
    final_rate: float = 7.3e-6  # rate from there on (the last 167B tokens)

    def __post_init__(self):
        _check_not_negative(
            self, "warmup_steps", "constant_tokens", "decay_tokens", "decayed_rate", "hold_tokens", "final_rate"
        )

    def build(self, peak: float, num_steps: int) -> Schedule:
        """The published curve; `num_steps` does not stretch it."""
        held_until = self.constant_tokens + self.decay_tokens + self.hold_tokens

        def rate(step, tokens):
            tokens = _float(tokens)
            progress = (tokens - self.constant_tokens) / max(self.decay_tokens, 1.0)
            later = jnp.where(tokens < held_until, _cosine(peak, self.decayed_rate, progress), self.final_rate)
            return jnp.minimum(peak * _warmup(step, self.warmup_steps), later)

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDecayConfig:
    """Warm-up, then drops by a factor: DeepSeek-V2 (arXiv:2405.04434, section 3.1.2) drops to 0.316 at 60 % and at 90 %."""

    warmup_steps: int = 2000  # linear warm-up from zero
    boundaries: tuple[float, ...] = (0.6, 0.9)  # shares of the steps after which the rate drops
    factor: float = 0.316  # what each drop multiplies the rate by

    def __post_init__(self):
        _check_not_negative(self, "warmup_steps", "factor")
        if list(self.boundaries) != sorted(set(self.boundaries)) or any(not 0 < edge < 1 for edge in self.boundaries):
            raise UserError(f"boundaries={self.boundaries} must rise and lie between 0 and 1")

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Warm-up, then peak * factor ** (boundaries passed)."""
        warmup = _warmup_steps(self.warmup_steps, 0.0, num_steps)
        edges = jnp.asarray(self.boundaries, jnp.float32) * num_steps

        def rate(step, tokens):
            drops = jnp.sum(_float(step) >= edges, dtype=jnp.float32)
            return peak * _warmup(step, warmup) * self.factor**drops

        return rate


ScheduleConfig = WsdConfig | CosineConfig | StepDecayConfig | DeepSeekV3ScheduleConfig | ConstantConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiecewiseConfig:
    """A number that jumps: DeepSeek-V3's MTP weight is 0.3 until 10e12 tokens, then 0.1 (report, section 4.2)."""

    values: tuple[float, ...] = (1.0,)  # one more than boundaries
    boundaries: tuple[float, ...] = ()  # where the next value begins, rising
    unit: Literal["fraction", "tokens"] = "fraction"  # what boundaries count: the share of num_steps, or tokens seen

    def __post_init__(self):
        if len(self.values) != len(self.boundaries) + 1:
            raise UserError(f"values={self.values} must have one entry more than boundaries={self.boundaries}")
        if list(self.boundaries) != sorted(set(self.boundaries)) or any(edge < 0 for edge in self.boundaries):
            raise UserError(f"boundaries={self.boundaries} must rise and not be negative")
        if self.unit == "fraction" and any(edge > 1 for edge in self.boundaries):
            raise UserError(f'boundaries={self.boundaries} must lie within 0 and 1, or set unit="tokens"')

    def build(self, num_steps: int) -> Schedule:
        """values[i] from boundaries[i - 1] up to, not including, boundaries[i]."""
        edges = jnp.asarray(self.boundaries, jnp.float32)
        values = jnp.asarray(self.values, jnp.float32)

        def value(step, tokens):
            position = _float(tokens) if self.unit == "tokens" else _float(step) / num_steps
            return values[jnp.sum(position >= edges, dtype=jnp.int32)]

        return value


def _float(x: jax.Array | float) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _warmup(step: jax.Array | int, warmup_steps: int) -> jax.Array:
    """1/n, 2/n, ... 1: the first update already moves, the n-th has the full rate."""
    return jnp.minimum((_float(step) + 1.0) / max(warmup_steps, 1), 1.0)


def _cosine(start: float, end: float, progress: jax.Array) -> jax.Array:
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def _warmup_steps(steps: int | None, fraction: float, num_steps: int) -> int:
    if steps is not None and steps > num_steps:
        raise UserError(f"optim.schedule.warmup_steps={steps} is more than num_steps={num_steps}; lower it")
    return round(fraction * num_steps) if steps is None else steps


def _check_fractions(config, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise UserError(f"{name}={getattr(config, name)} must lie within 0 and 1")


def _check_not_negative(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise UserError(f"{name}={value} must not be negative")
