"""Writes safetensors files, shard by shard, each in pieces of rows."""

import dataclasses
import functools
import math
import os
import pathlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence

from experiments.conversion.arrays import Size, split, sum_of_words
from experiments.conversion.recast import Recipe
from experiments.conversion.sources import leave_page_cache, sum_on_disk
from experiments.conversion.work import Piece
from mdl.hf.safetensors import read_header
from mdl.hf.safetensors_write import Shard, ShardWriter, plan_shards

_PIECE_BYTES = 64 << 20  # memory of a piece, where one step of rows takes less


def plan_files(
    directory: pathlib.Path, recipes: Iterable[Recipe], max_shard_bytes: int
) -> tuple[list[Shard], list["ShardUnit"]]:
    """The files that hold what these recipes make, tensors in the order of their layers."""
    ordered = sorted(recipes, key=lambda recipe: _natural(next(iter(recipe.sizes))))
    sizes: dict[str, Size] = {}
    for recipe in ordered:
        sizes |= recipe.sizes
    shards = plan_shards(sizes, max_shard_bytes)
    home = {name: i for i, shard in enumerate(shards) for name in shard.entries}
    makers: list[list[Recipe]] = [[] for _ in shards]
    for recipe in ordered:
        for i in sorted({home[name] for name in recipe.sizes}):  # two, where scales begin a shard of their own
            makers[i].append(recipe)
    return shards, [ShardUnit(directory, shard, made) for shard, made in zip(shards, makers, strict=True)]


@dataclasses.dataclass(frozen=True)
class ShardUnit:
    directory: pathlib.Path
    shard: Shard
    recipes: Sequence[Recipe]  # that make a tensor of this shard

    @property
    def name(self) -> str:
        return self.shard.file

    @property
    def num_bytes(self) -> int:
        return self.shard.num_bytes

    def begin(self) -> "_ShardJob":
        return _ShardJob(self)

    def verify(self, sums: Mapping[str, int]) -> bool:
        file = self.directory / self.shard.file
        entries = read_header(file)
        if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != dict(self.shard.entries):
            return False
        descriptor = os.open(file, os.O_RDONLY)  # the writer has synced it
        try:
            found = {
                name: sum_on_disk(descriptor, (entry.dtype, entry.shape), entry.start, file)
                for name, entry in entries.items()
            }
            leave_page_cache(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        return found == sums


class _ShardJob:
    def __init__(self, unit: ShardUnit):
        self._writer = ShardWriter(unit.directory, unit.shard).__enter__()
        self._entries = unit.shard.entries
        self._sums = dict.fromkeys(unit.shard.entries, 0)
        self._lock = threading.Lock()
        self.pieces = [
            Piece(recipe.row_bytes * len(rows), functools.partial(self._run, recipe, rows))
            for recipe in unit.recipes
            for rows in _cut(recipe)
        ]

    def _run(self, recipe: Recipe, rows: range) -> int:
        written = 0
        for name, (begin, array) in recipe.make(rows).items():
            if name in self._entries:
                self._writer.write(name, array, slice(begin, begin + len(array)))
                part = sum_of_words(array)
                with self._lock:
                    self._sums[name] = (self._sums[name] + part) % 2**32
                written += array.nbytes
        return written

    def finish(self) -> dict[str, int]:
        self._writer.__exit__(None, None, None)
        return self._sums

    def abandon(self) -> None:
        error = InterruptedError("the file is not whole")
        self._writer.__exit__(type(error), error, None)


def _cut(recipe: Recipe) -> list[range]:
    """Rows of one piece each."""
    _, shape = next(iter(recipe.sizes.values()))
    length = shape[0] if shape else 1
    steps = split(math.ceil(length / recipe.row_step), _PIECE_BYTES // max(1, recipe.row_bytes * recipe.row_step))
    return [range(s.start * recipe.row_step, min(s.stop * recipe.row_step, length)) for s in steps]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Layer 9 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
