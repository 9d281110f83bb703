"""Slices and clusters of chips that are not there: their devices, and sharded programs compiled for all of them."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from kernels_pallas import aot

TORUS_DIMS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
# Kernels come out the same for H100 and H200, so that only whole programs are compiled for both.
H100 = aot.hopper(
    "NVIDIA H100 80GB HBM3", memory_rate=3_352_320_000_000, memory_bytes=84_978_434_048, cache_bytes=52_428_800
)
CHIPS = aot.CHIPS | {"h100": aot.Chip(name="h100", topology="1x1x1", platform="cuda", target=H100)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    chip: aot.Chip
    shape: str  # TPU: chips along each axis of the torus, 8x8x8; GPU: slices x hosts x GPUs of a host, 1x128x8

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @functools.cached_property
    def devices(self) -> list[Any]:
        """In the order of their ids. Raises Unavailable, and ValueError for a shape that cannot be built of these chips."""
        aot.check_installed()
        is_tpu = self.chip.target is None
        options = {} if is_tpu else {"target_config": self.chip.target, "topology": self.shape}
        with aot.compilers():
            try:
                found = topologies.get_topology_desc(
                    str(self) if is_tpu else self.chip.name, self.chip.platform, **options
                ).devices
            except NotImplementedError as error:  # the plugin did not load
                raise aot.Unavailable(f"no compiler for {self.chip.name} in this process ({error})") from error
            except jax.errors.JaxRuntimeError as error:
                raise ValueError(str(error).partition(": ")[2].splitlines()[0]) from error
        return list(found)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """In this block, under a mesh of `devices`, programs are compiled for this cluster."""
        with aot.compilers():
            yield

    @property
    def devices_per_host(self) -> int | None:
        """GPUs that links join; None where they join all devices."""
        return None if self.chip.target is None else int(self.shape.split("x")[2])


def cluster(name: str) -> Cluster:
    """The cluster that is spelled `v5p:8x8x8` or `h200:1x128x8`. ValueError says how they are spelled."""
    chip_name, _, shape = name.partition(":")
    if chip_name not in CHIPS:
        raise ValueError(f"no chip {chip_name!r}; there are {', '.join(CHIPS)}")
    chip = CHIPS[chip_name]
    dims = TORUS_DIMS.get(chip_name, 3)
    example = chip.topology.rpartition(":")[2]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        meaning = "slices x hosts x GPUs of a host" if chip_name not in TORUS_DIMS else "chips along each axis"
        raise ValueError(f"{chip_name} takes {meaning}, such as {chip_name}:{example}")
    return Cluster(chip=chip, shape=shape)
