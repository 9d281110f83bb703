"""Production shapes for tests, compile checks and benches."""

import dataclasses

from kernels_pallas.flash_attention.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Causal, queries and keys ending together."""

    batch: int = 1
    queries: int
    keys: int | None = None  # none: as many as queries
    heads: int
    kv_heads: int | None = None  # none: as many as heads
    qk_width: int
    v_width: int

    @property
    def q_BTNK(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.heads, self.qk_width

    @property
    def k_BSZK(self) -> tuple[int, int, int, int]:
        return self.batch, self.keys or self.queries, self.kv_heads or self.heads, self.qk_width

    @property
    def v_BSZU(self) -> tuple[int, int, int, int]:
        return *self.k_BSZK[:3], self.v_width

    @property
    def mask(self) -> Mask:
        return Mask(causal=True, q_offset=self.k_BSZK[1] - self.queries)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, over rows and heads."""
        keys = self.k_BSZK[1]
        return self.batch * self.heads * (self.queries * keys - self.queries * (self.queries - 1) // 2)

    @property
    def forward_flops(self) -> int:
        """Two products."""
        return 2 * self.pairs * (self.qk_width + self.v_width)

    @property
    def backward_flops(self) -> int:
        """Five products, the logits again among them."""
        return 2 * self.pairs * (3 * self.qk_width + 2 * self.v_width)


_V3_SHARD = {"heads": 16, "qk_width": 192, "v_width": 128}  # 128 heads over 8 devices; also all of V2-Lite
_LLAMA = {"heads": 32, "kv_heads": 8, "qk_width": 128, "v_width": 128}

SHAPES: dict[str, Shape] = {
    "tiny train": Shape(batch=8, queries=256, heads=4, qk_width=48, v_width=32),
    "small train 1K": Shape(batch=4, queries=1024, heads=4, qk_width=64, v_width=64),
    "small train 2K": Shape(queries=2048, heads=4, qk_width=64, v_width=64),
    "small prefill 1K of 4K": Shape(queries=1024, keys=4096, heads=4, kv_heads=2, qk_width=64, v_width=64),
    "mla train 4K": Shape(**_V3_SHARD, batch=4, queries=4096),
    "mla train 32K": Shape(**_V3_SHARD, queries=32768),
    "mla train 128K": Shape(**_V3_SHARD, queries=131072),
    "mla prefill 4K of 32K": Shape(**_V3_SHARD, queries=4096, keys=32768),
    "gqa train 4K": Shape(**_LLAMA, batch=4, queries=4096),
    "gqa train 8K": Shape(**_LLAMA, batch=2, queries=8192),
    "gqa train 128K": Shape(**_LLAMA, queries=131072),
    "gqa prefill 4K of 32K": Shape(**_LLAMA, queries=4096, keys=32768),
    "gqa decode of 8K": Shape(**_LLAMA, batch=32, queries=1, keys=8192),
    "wide train 4K": Shape(heads=16, kv_heads=8, queries=4096, qk_width=256, v_width=256),
    "absorbed mla prefill 4K": Shape(heads=16, kv_heads=1, queries=4096, qk_width=576, v_width=512),
}
