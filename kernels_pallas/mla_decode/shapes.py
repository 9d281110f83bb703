"""Production shapes of decoding for tests, compile checks and benches."""

import dataclasses

LATENT, ROPE = 512, 64  # C and R of every DeepSeek model with MLA


def page(platform: str) -> int:
    """Rows Y of a page: on TPU what fills the lanes of a register, elsewhere FlashMLA's."""
    return 128 if platform == "tpu" else 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int
    heads: int
    length: int  # tokens that every row holds
    queries: int = 1
    capacity: int | None = None  # None: as many as the rows hold


# By name. With 128 heads the products bound the time on an H200, with 16 (V2-Lite, or V3 split over 8 devices) reading the cache.
SHAPES: dict[str, Shape] = {
    "v3, 4K": Shape(batch=128, heads=128, length=4096),
    "v3, 4K, two queries": Shape(batch=128, heads=128, length=4096, queries=2),
    "v3, 32K": Shape(batch=16, heads=128, length=32768),
    "v3, one row of 128K": Shape(batch=1, heads=128, length=131072),
    "16 heads, 4K": Shape(batch=128, heads=16, length=4096),
    "16 heads, 32K": Shape(batch=16, heads=16, length=32768),
    "16 heads, one row of 32K": Shape(batch=1, heads=16, length=32768),
    "16 heads, 1K in a cache of 32K": Shape(batch=4, heads=16, length=1024, capacity=32768),
}
