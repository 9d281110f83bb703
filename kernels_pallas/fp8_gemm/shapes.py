"""Production shapes for compile checks and benches: DeepGEMM's published rows, dense and grouped."""

from kernels_pallas.grouped_gemm import shapes as grouped
from kernels_pallas.grouped_gemm.shapes import Shape


def _dense(rows: int, outer: int, inner: int) -> Shape:
    return Shape(groups=1, rows=rows, inner=inner, outer=outer)


SHAPES: dict[str, Shape] = {
    "v3 kv_a_proj and q_a_proj, 64 rows": _dense(64, 2112, 7168),
    "v3 o_proj, 128 rows": _dense(128, 7168, 16384),
    "v3 q_b_proj, 4096 rows": _dense(4096, 24576, 1536),
    "v3 kv_b_proj, 4096 rows": _dense(4096, 32768, 512),
    "v3 o_proj, 4096 rows": _dense(4096, 7168, 16384),
    "v3 gate and up, 4096 rows": _dense(4096, 4096, 7168),
    "v3 down, 4096 rows": _dense(4096, 7168, 2048),
    **{name: shape for name, shape in grouped.SHAPES.items() if name.startswith("v3")},
    "edges": Shape(groups=3, rows=1000, inner=448, outer=576),  # no multiple of a tile, or of a block
    "edges, few rows": Shape(groups=3, rows=45, inner=2112, outer=576),
}
