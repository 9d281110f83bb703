"""What a run says about itself before it starts."""

import dataclasses
import types

import jax
import pytest

from configs import tiny
from experiments.describe import describe
from experiments.peak_flops import Peak


def said_of(config):
    lines = []
    nothing = types.SimpleNamespace(tokens_per_epoch=0, validation_bytes=0)
    mesh = config.mesh.build(jax.devices()[:1])
    peak = Peak(flops=1e12, line="peak: 1 TFLOP/s")
    describe(config, nothing, mesh, peak, lines.append)  # pyright: ignore[reportArgumentType]
    return lines


def test_forced_balance_is_never_silent():
    config = tiny.get_config()
    assert not any("forced_balance" in line and "warning" in line for line in said_of(config))
    with pytest.warns(UserWarning, match="forced_balance"):
        router = dataclasses.replace(config.model.moe.router, forced_balance=True)
    moe = dataclasses.replace(config.model.moe, router=router)
    forced = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert said_of(forced)[-1] == (
        "warning: model.moe.router.forced_balance sends tokens to experts in turn, not to those they fit; for benchmarks only"
    )
