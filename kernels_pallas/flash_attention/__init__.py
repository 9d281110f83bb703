"""Softmax attention that never holds the whole score matrix of a long sequence."""
