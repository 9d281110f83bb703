"""Production shapes for compile checks and benches: latents of DeepSeek-V3.2, whose queries are absorbed."""

import dataclasses

LATENT, ROPE = 512, 64  # widths of the values and of what keys have beyond them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int = 1
    queries: int
    keys: int
    heads: int
    selected: int = 2048

    @property
    def q_BTNK(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.heads, LATENT + ROPE

    @property
    def k_BSZK(self) -> tuple[int, int, int, int]:
        return self.batch, self.keys, 1, LATENT + ROPE

    @property
    def index_BTW(self) -> tuple[int, int, int]:
        return self.batch, self.queries, self.selected

    @property
    def out_BTNU(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.heads, LATENT

    @property
    def forward_flops(self) -> int:
        return 2 * self._pairs * (2 * LATENT + ROPE)

    @property
    def backward_flops(self) -> int:
        """With the logits made again."""
        return 2 * self._pairs * (3 * (LATENT + ROPE) + 2 * LATENT)

    @property
    def _pairs(self) -> int:
        return self.batch * self.queries * self.heads * self.selected


SHAPES: dict[str, Shape] = {
    "16 heads, 64 of 4K, 512 keys": Shape(queries=64, keys=4096, heads=16, selected=512),  # which a CPU does in no time
    "v3.2 train 4K of 128K": Shape(queries=4096, keys=131072, heads=128),
    "16 heads train 4K of 32K": Shape(queries=4096, keys=32768, heads=16),  # 128 heads over 8 devices
    "16 heads train 32K, 512 keys": Shape(queries=32768, keys=32768, heads=16, selected=512),
}
