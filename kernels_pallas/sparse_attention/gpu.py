"""Attention to selected latents on Hopper: forward by the kernel of decoding, backward in plain JAX."""

import functools

from kernels_pallas.sparse_attention import by_decoding, xla

forward = functools.partial(by_decoding.forward, implementation="gpu")
backward = xla.backward
