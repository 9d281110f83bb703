"""Corpora, the token cache and the stream of packed batches."""
