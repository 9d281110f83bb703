"""The least time that a compiled step can take on a chip, by the published rates of its parts."""

import dataclasses

from experiments.compilation.chips import ChipRates
from experiments.compilation.collectives import Traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step, each part alone at its full rate; `network` is part of no other."""

    compute: float
    memory: float
    links: float
    network: float
    useful: float  # the model's own operations at the peak rate: what MFU is a share of

    @property
    def overlapped(self) -> float:
        """Everything at the same time."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def in_turn(self) -> float:
        """Nothing at the same time but computing and reading memory."""
        return max(self.compute, self.memory) + self.links + self.network

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization in turn and overlapped: the range to expect from perfect kernels."""
        return self.useful / self.in_turn, self.useful / self.overlapped


def roofline(
    *,
    model_flops: float,
    program_flops: float,
    memory_bytes: float,
    traffic: list[Traffic],
    peak: float,
    rates: ChipRates,
) -> Roofline:
    """FLOPs and bytes of one device in one step; peak in FLOP/s."""
    network = sum(line.network_bytes for line in traffic)
    links = sum(line.bytes for line in traffic) - network
    return Roofline(
        compute=max(program_flops, model_flops) / peak,  # products of silent kernels are not among the program's
        memory=memory_bytes / rates.hbm_rate,
        links=links / rates.link_rate,
        network=network / rates.network_rate if rates.network_rate else 0.0,
        useful=model_flops / peak,
    )
