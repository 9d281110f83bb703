"""Cross-entropy of a linear head in chunks, so that the logits of all rows never exist together."""
