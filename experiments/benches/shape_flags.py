"""Flags that choose among the production shapes of a kernel those to measure on this machine."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from experiments.benches.report import BenchFlags
from experiments.errors import UserError

S = TypeVar("S")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeFlags(BenchFlags, abc.ABC):
    contains: str = ""  # leave out shapes without this in their name
    max_gflop: float = 4  # leave out shapes that take more operations forward

    def __post_init__(self):
        super().__post_init__()
        _ = self.shapes  # UserError before anything is measured

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, Any]:
        """Those to measure, by name: what `keep` leaves of the kernel's."""

    def keep(self, shapes: dict[str, S], flops: Callable[[S], float]) -> dict[str, S]:
        """Those that the flags leave, of which there is one at least; UserError otherwise."""
        kept = {
            name: shape
            for name, shape in shapes.items()
            if self.contains in name and flops(shape) <= 1e9 * self.max_gflop
        }
        if not kept:
            raise UserError(
                f"--contains={self.contains} --max_gflop={self.max_gflop} leave no shape of {', '.join(shapes)}"
            )
        return kept
