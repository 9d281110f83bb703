"""The lightning indexer: which keys a query attends to, and how it learns from the attention that it serves."""

from kernels_pallas.lightning_indexer.api import SAVED_NAMES, IndexerKl, dense_kl, recall, select_keys, selected_kl

__all__ = ["SAVED_NAMES", "IndexerKl", "dense_kl", "recall", "select_keys", "selected_kl"]
