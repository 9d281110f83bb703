"""The lightning indexer: which keys a query attends to, and how it learns from the attention that it serves."""

from kernels_pallas.lightning_indexer.api import SAVED_NAMES, IndexerKl, dense_kl, recall, select_keys, selected_kl
from kernels_pallas.lightning_indexer.published import hadamard, keys_to_fp8, to_fp8

__all__ = [
    "SAVED_NAMES",
    "IndexerKl",
    "dense_kl",
    "hadamard",
    "keys_to_fp8",
    "recall",
    "select_keys",
    "selected_kl",
    "to_fp8",
]
