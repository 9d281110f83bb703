"""Matrix products of row groups, each group with its own matrix."""
