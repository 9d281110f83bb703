"""Routed SwiGLU experts: dispatch, the three products and the weighted combination on one device."""
