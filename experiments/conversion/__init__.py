"""Checkpoints of one format from those of another, a slice of a tensor at a time."""
