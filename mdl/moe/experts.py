"""The routed experts' weights: one SwiGLU network per expert, stacked."""

from flax import nnx

from mdl.linear import Init


class Experts(nnx.Module):
    """gate_EDF, up_EDF, down_EFD; `dispatch` brings tokens to them."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, *, init: Init):
        E, D, F = num_experts, hidden_size, intermediate_size
        self.precision = init.precision
        self.gate_EDF = init.normal((E, D, F), ("experts", "embed", "mlp"))
        self.up_EDF = init.normal((E, D, F), ("experts", "embed", "mlp"))
        self.down_EFD = init.normal((E, F, D), ("experts", "mlp", "embed"))
