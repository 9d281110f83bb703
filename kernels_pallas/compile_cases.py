"""What must compile for chips that are not here: the tests check it, and `experiments.bench aot` prints the table.

An op joins with a file of its own and one line below.
"""

from kernels_pallas.aot import CompileCase
from kernels_pallas.flash_attention import compile_cases as flash_attention
from kernels_pallas.fp8 import compile_cases as fp8
from kernels_pallas.fp8_gemm import compile_cases as fp8_gemm
from kernels_pallas.grouped_gemm import compile_cases as grouped_gemm
from kernels_pallas.lightning_indexer import compile_cases as lightning_indexer
from kernels_pallas.mla_decode import compile_cases as mla_decode
from kernels_pallas.sparse_attention import compile_cases as sparse_attention


def compile_cases() -> list[CompileCase]:
    return [
        *flash_attention.compile_cases(),
        *fp8.compile_cases(),
        *fp8_gemm.compile_cases(),
        *grouped_gemm.compile_cases(),
        *lightning_indexer.compile_cases(),
        *mla_decode.compile_cases(),
        *sparse_attention.compile_cases(),
    ]
