"""Picks the implementation of an op, says once which, and refuses clearly."""

import contextlib
import contextvars
import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")
Result = TypeVar("Result")
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # in the name of a GPU: "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"
log = logging.getLogger(__name__)
_preferred: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("_preferred", default=frozenset())


class Unsupported(ValueError):  # noqa: N818 (the name is what a caller reads: "Unsupported: grouped_gemm ...")
    """An implementation declines a call; the message says what it lacks."""


class LazyModule:
    """A back end's module, imported when it is first used: Pallas takes a second to import, and most runs never call it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


@contextlib.contextmanager
def prefer_kernels(ops: Iterable[str]) -> Iterator[None]:
    """While something is traced in here: these ops, where nothing is named, take the chip's kernel if it has one (`attempt`)."""
    token = _preferred.set(frozenset(ops))
    try:
        yield
    finally:
        _preferred.reset(token)


def attempt(op: str, implementation: str | None, table: Mapping[str, T], call: Callable[[T], Result]) -> Result:
    """`call` with the implementation of `op` that `select` gives, or with the chip's kernel where that is preferred.

    A kernel that is not there, or declines the call, leaves it to the first of `table`, and why is said once. A backward pass that
    a kernel declines is refused: the forward pass has been made by then.
    """
    if implementation is not None or op not in _preferred.get():
        return call(select(op, implementation, table))
    default, kernel = next(iter(table)), chip()
    if kernel is None or kernel not in table:
        say(op, f"{default}, since there is no kernel for {_device().device_kind}")
        return call(table[default])
    try:
        result = call(table[kernel])
    except Unsupported as reason:
        say(op, f"{default}, since {reason}")
        return call(table[default])
    say(op, kernel)
    return result


def select(op: str, implementation: str | None, table: Mapping[str, T]) -> T:
    """Returns the named implementation of `op`; None takes the first of `table`, the best that runs everywhere."""
    name = next(iter(table)) if implementation is None else implementation
    if name not in table:
        raise Unsupported(f"{op} has no implementation {name!r}; it has {', '.join(table)}")
    if implementation is None:
        say(op, name)
    return table[name]


def platform() -> str:
    """What is compiled for, as `jax.default_backend()` spells it: the mesh's devices, which need not be those of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def chip() -> str | None:
    """Whose kernels can run on what is compiled for: "tpu", "gpu" for Hopper, or None."""
    if platform() == "tpu":
        return "tpu"
    return "gpu" if platform() == "gpu" and HOPPER.search(_device().device_kind) else None


def _device() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


@functools.cache
def say(op: str, name: str) -> None:
    """Logs a choice, once."""
    log.info("%s: implementation %s", op, name)
