"""Which implementation runs: the one that is named, the kernel of the chip where it is preferred, plain JAX everywhere else."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import Unsupported, select
from kernels_pallas.select import attempt, prefer_kernels

TABLE = {"xla": "plain", "tpu": "kernel", "reference": "float32"}


@pytest.fixture(autouse=True)
def said(caplog):
    """The lines of the log; every test begins with nothing said."""
    select.say.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas.select"):
        yield lambda: caplog.messages
    select.say.cache_clear()


@pytest.fixture
def on(monkeypatch):
    def on(platform: str, kind: str) -> None:
        monkeypatch.setattr(select, "platform", lambda: platform)
        monkeypatch.setattr(select, "_device", lambda: types.SimpleNamespace(device_kind=kind))

    return on


def run(implementation=None, declines=(), op="op"):
    def call(form):
        if form in declines:
            raise Unsupported(f"op has no {form}; 'xla' has")
        return form

    return attempt(op, implementation, TABLE, call)


@pytest.mark.parametrize(
    ("platform", "kind", "chip"),
    [
        ("cpu", "cpu", None),
        ("tpu", "TPU v5 lite", "tpu"),
        ("tpu", "TPU7x", "tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "gpu"),
        ("gpu", "NVIDIA H200", "gpu"),
        ("gpu", "NVIDIA GH200 480GB", "gpu"),
        ("gpu", "NVIDIA H20-3e", "gpu"),
        ("gpu", "Tesla T4", None),
        ("gpu", "NVIDIA A100-SXM4-80GB", None),
        ("gpu", "NVIDIA B200", None),
        ("gpu", "NVIDIA GB200", None),
    ],
)
def test_chips_that_kernels_are_for(platform, kind, chip, on):
    on(platform, kind)
    assert select.chip() == chip


def test_plain_jax_unless_a_kernel_is_preferred(on, said):
    on("tpu", "TPU v5")
    with prefer_kernels({"another"}):
        assert run() == run() == "plain"
    assert said() == ["op: implementation xla"]


def test_a_preferred_kernel_runs(on, said):
    on("tpu", "TPU v5")
    with prefer_kernels({"op"}):
        assert run() == run() == "kernel"
    assert run() == "plain"
    assert said() == ["op: implementation tpu", "op: implementation xla"]


def test_a_preferred_kernel_that_declines_is_replaced_and_that_is_said_once(on, said):
    on("tpu", "TPU v5")
    with prefer_kernels({"op"}):
        assert run(declines=("kernel",)) == run(declines=("kernel",)) == "plain"
    assert said() == ["op: implementation xla, since op has no kernel; 'xla' has"]


def test_other_chips_have_no_kernel_and_that_is_said_once(on, said):
    on("gpu", "Tesla T4")
    with prefer_kernels({"op"}):
        assert run() == run() == "plain"
    assert said() == ["op: implementation xla, since there is no kernel for Tesla T4"]


def test_what_is_named_is_never_replaced(on):
    on("tpu", "TPU v5")
    with prefer_kernels({"op"}):
        assert run("reference") == "float32"
        with pytest.raises(Unsupported, match="op has no kernel"):
            run("tpu", declines=("kernel",))
        with pytest.raises(Unsupported, match="op has no implementation 'gpu'; it has xla, tpu, reference"):
            run("gpu")


def test_preferences_end_with_an_error(on):
    on("tpu", "TPU v5")
    with pytest.raises(ZeroDivisionError), prefer_kernels({"op"}):
        raise ZeroDivisionError
    assert run() == "plain"


def test_the_device_is_that_of_the_mesh():
    assert select.chip() is None
    with jax.set_mesh(jax.make_mesh((1,), ("a",))):
        assert jax.eval_shape(lambda x: x if select.chip() is None else None, jnp.zeros(1)) is not None
