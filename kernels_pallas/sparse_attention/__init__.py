"""Softmax attention of each query over a list of keys of its own."""
