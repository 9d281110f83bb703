"""Production shapes of the indexer for compile checks and benches."""

import dataclasses

from kernels_pallas.flash_attention.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The last queries of a row of keys; by default as in DeepSeek-V3.2, whose attention is absorbed: one key head."""

    queries: int
    keys: int
    index_heads: int = 64
    index_width: int = 128
    topk: int = 2048
    heads: int = 128
    width: int = 576  # of the attention's keys: latents and rotary keys

    @property
    def mask(self) -> Mask:
        return Mask(causal=True, q_offset=self.keys - self.queries)

    @property
    def score_flops(self) -> int:
        """Of the index heads' products with the keys that queries see."""
        pairs = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) // 2
        return 2 * pairs * self.index_heads * self.index_width


SHAPES: dict[str, Shape] = {
    "tiny_dsa": Shape(queries=256, keys=256, index_heads=4, index_width=32, topk=64, heads=4, width=80),
    "v3.2 4K": Shape(queries=4096, keys=4096),
    "v3.2 4K of 32K": Shape(queries=4096, keys=32768),
    "v3.2 4K of 128K": Shape(queries=4096, keys=131072),
    "v3.2 one query of 32K": Shape(queries=1, keys=32768),
}
