"""Evaluations that a run performs while it trains."""
