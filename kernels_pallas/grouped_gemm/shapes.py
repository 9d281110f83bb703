"""Production shapes for tests, compile checks and benches."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    groups: int  # E, experts on a device
    rows: int  # M, of all groups
    inner: int  # D
    outer: int  # F

    @property
    def x_MD(self) -> tuple[int, int]:
        return self.rows, self.inner

    @property
    def w_EDF(self) -> tuple[int, int, int]:
        return self.groups, self.inner, self.outer

    @property
    def y_MF(self) -> tuple[int, int]:
        return self.rows, self.outer

    @property
    def flops(self) -> int:
        """Of each of the three products, if every row is in a group."""
        return 2 * self.rows * self.inner * self.outer


# The first four have rows in DeepGEMM's published table.
SHAPES: dict[str, Shape] = {
    "v3 gate and up, 4 x 8192": Shape(groups=4, rows=32768, inner=7168, outer=4096),
    "v3 down, 4 x 8192": Shape(groups=4, rows=32768, inner=2048, outer=7168),
    "v3 gate and up, 8 x 4096": Shape(groups=8, rows=32768, inner=7168, outer=4096),
    "v3 down, 8 x 4096": Shape(groups=8, rows=32768, inner=2048, outer=7168),
    "v3 gate, 32 x 128": Shape(groups=32, rows=4096, inner=7168, outer=2048),
    "v3 gate, 256 x 2048": Shape(groups=256, rows=524288, inner=7168, outer=2048),  # each array beyond 2**31 elements
    "v2-lite gate, 64 x 384": Shape(groups=64, rows=24576, inner=2048, outer=1408),
    "v2-lite down, 64 x 384": Shape(groups=64, rows=24576, inner=1408, outer=2048),
    "moe_1b gate, 64 x 1536": Shape(groups=64, rows=98304, inner=1024, outer=448),
    "moe_1b down, 64 x 1536": Shape(groups=64, rows=98304, inner=448, outer=1024),
    "small, 16 x 512": Shape(groups=16, rows=8192, inner=512, outer=512),
}
