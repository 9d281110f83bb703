"""Attention variants; each has its Config beside it."""
