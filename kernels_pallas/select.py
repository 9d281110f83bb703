"""Picks the implementation of an op, says once which, and refuses clearly."""

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")
log = logging.getLogger(__name__)


class Unsupported(ValueError):  # noqa: N818 (the name is what a caller reads: "Unsupported: grouped_gemm ...")
    """An implementation declines a call; the message says what it lacks."""


class LazyModule:
    """A back end's module, imported when it is first used: Pallas takes a second to import, and most runs never call it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


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


@functools.cache
def say(op: str, name: str) -> None:
    """Logs a choice, once."""
    log.info("%s: implementation %s", op, name)
