"""Which ops of the model run as Pallas kernels."""

import dataclasses
from typing import Literal

Form = Literal["xla", "pallas"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Plain JAX, or the Pallas kernel for TPU or Hopper; fields are named as the ops of `kernels_pallas`.

    Other chips, and calls that a kernel declines, stay with plain JAX, and the log says so.
    """

    flash_attention: Form = "xla"  # attention to all visible keys
    sparse_attention: Form = "xla"  # attention to the keys that an indexer selects
    select_keys: Form = "xla"  # an indexer's scores
    mla_decode: Form = "xla"  # attention of new tokens to a cache of latents
    expert_mlp: Form = "xla"  # routed experts

    @property
    def preferred(self) -> frozenset[str]:
        """The ops that take kernels."""
        forms = {
            "flash_attention": self.flash_attention,
            "sparse_attention": self.sparse_attention,
            "select_keys": self.select_keys,
            "mla_decode": self.mla_decode,
            "expert_mlp": self.expert_mlp,
        }
        return frozenset(op for op, form in forms.items() if form == "pallas")
