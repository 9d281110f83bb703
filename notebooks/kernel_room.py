# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A kernel room
#
# Every operation in `kernels_pallas/` that is worth a kernel has a room of its own: a public function, a reference that is
# its equation, a plain XLA form for every platform, and one file for each platform whose kernel was written by hand. This
# notebook walks through one of them, the FP8 format of DeepSeek-V3, from the equation to compiled code for chips that are not
# in the room. You need no accelerator, and you need not have seen Pallas before.

# %%
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("kernels_pallas") is None:
    # The clone that this notebook lies in; on Colab give "git+https://" and the repository's address.
    SOURCE = pathlib.Path.cwd().parent.as_uri()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"mdl[plot,aot] @ {SOURCE}"], check=True)

# %%
import os

# The compilers of section 4 want this; to compute on the chip that you have, leave it out.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

print("jax", jax.__version__, "on", jax.default_backend())

# %% [markdown]
# ## 1. The equation
#
# FP8 (e4m3) has four bits of exponent and three of mantissa: 448 is its largest number, 2^-9 its smallest. Activations have
# outliers, and one factor for a whole tensor would push everything else into the last few bits. DeepSeek-V3 (section 3.3)
# scales tiles of 1 x 128 numbers, each by its own largest magnitude:
#
# $$ s = \max\left(\max_{\text{tile}} |x_j|,\ 10^{-4}\right) / 448, \quad q_j = \mathrm{e4m3}(x_j / s), \quad x_j \approx q_j s $$
#
# In NumPy, as the equation stands:

# %%
import ml_dtypes


def quantize_numpy(x_MN):
    x_MGE = x_MN.reshape(x_MN.shape[0], -1, 128)  # G tiles of 128 in a row
    scale_MG = np.maximum(np.abs(x_MGE).max(axis=-1), 1e-4) * np.float32(1 / 448)
    q_MGE = np.clip(x_MGE / scale_MG[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return q_MGE.reshape(x_MN.shape), scale_MG


rng = np.random.default_rng(0)
x_MN = rng.standard_normal((256, 1024)).astype(np.float32)
x_MN[:, 7] *= 300  # an outlier channel, as trained models have them
q_MN, scale_MG = quantize_numpy(x_MN)
print(q_MN.dtype, q_MN.shape, "and scales", scale_MG.shape)

# %% [markdown]
# What tiles buy: the error of every number, with one scale for all of them, and with one for each tile. To the left of where
# a curve rises, numbers have lost their mantissa: they are rounded to zero, or to the smallest number there is.

# %%
whole = np.abs(x_MN).max() / 448
with_one_scale = (x_MN / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
with_tiles = q_MN.astype(np.float32) * np.repeat(scale_MG, 128, axis=1)

edges = np.logspace(-3, 0.5, 40)
middle = np.sqrt(edges[1:] * edges[:-1])
bin_MN = np.digitize(np.abs(x_MN), edges)
fig, ax = plt.subplots(figsize=(6, 3.2), dpi=90)
for name, y_MN in {"one scale for the tensor": with_one_scale, "a scale for each 1 x 128 tile": with_tiles}.items():
    error_MN = np.abs(y_MN - x_MN) / np.abs(x_MN)
    ax.loglog(middle, [np.median(error_MN[bin_MN == i]) for i in range(1, len(edges))], label=name)
ax.set(xlabel="magnitude of the number", ylabel="relative error, median", title="FP8 beside an outlier of 300 times")
ax.legend()
ax.grid(alpha=0.3)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 2. The room
#
# `kernels_pallas.fp8.quantize_activations` is the public function. It checks what it is given, and calls one implementation:
# `reference` (the equation in jax.numpy, for reading and testing), `xla` (plain JAX that is fast everywhere), `tpu` or `gpu`
# (kernels). They promise the same bits.

# %%
from kernels_pallas import fp8

for implementation in ("reference", "xla"):
    ours = jax.jit(lambda x, i=implementation: fp8.quantize_activations(x, implementation=i))(jnp.asarray(x_MN))
    same = np.array_equal(np.asarray(ours.data).view(np.uint8), q_MN.view(np.uint8))
    print(
        f"{implementation:9}  data equal to NumPy's, bit for bit: {same};  scales: {np.array_equal(ours.scale, scale_MG)}"
    )

# %% [markdown]
# ## 3. A kernel of your own
#
# A Pallas kernel is a Python function that is run once for each step of a grid. Its arguments are *references* to the part of
# each array that the step works on: `x_ref[...]` reads it into registers, `q_ref[...] = …` writes it. Which part that is, a
# `BlockSpec` says: a block shape, and a function from the step's place in the grid to the block's place in the array.
# Everything else (moving blocks between the device's memory and the fast memory beside the compute units, the next one while
# this one is worked on) is done for you.
#
# Here a step takes 32 rows and 128 columns, so that a row of a block is exactly one tile:

# %%
from jax.experimental import pallas as pl


def kernel(x_ref, q_ref, scale_ref):
    x = x_ref[...]  # [32, 128]
    amax = jnp.max(jnp.abs(x), axis=1, keepdims=True)  # [32, 1]: one for each tile
    scale = jnp.maximum(amax, 1e-4) * jnp.float32(1 / 448)
    q_ref[...] = jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn)
    scale_ref[...] = jnp.broadcast_to(scale, scale_ref.shape)


def quantize_pallas(x_MN, interpret=False):
    M, N = x_MN.shape
    block = pl.BlockSpec((32, 128), lambda i, j: (i, j))
    q_MN, scale_MN = pl.pallas_call(
        kernel,
        grid=(M // 32, N // 128),
        in_specs=[block],
        out_specs=(block, block),
        out_shape=(jax.ShapeDtypeStruct((M, N), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((M, N), jnp.float32)),
        interpret=interpret,
    )(x_MN)
    return q_MN, scale_MN[:, ::128]


mine, my_scale = quantize_pallas(x_MN, interpret=True)
print(
    "equal to NumPy's:",
    np.array_equal(np.asarray(mine).view(np.uint8), q_MN.view(np.uint8)),
    np.array_equal(my_scale, scale_MG),
)

# %% [markdown]
# `interpret=True` runs it step by step on any machine: slow, and exact. That is how kernels are tested here on machines
# without their chip.
#
# One thing in it is a compromise: TPUs move blocks of at least 8 x 128 numbers, so a result of one column per block does not
# exist, and the scale is written 128 times. `kernels_pallas/fp8/tpu.py` does better: a step takes 256 rows and 8 tiles, and
# the scales of a whole row of tiles stay in fast memory until they are all there. The room's own kernel, interpreted the same
# way:

# %%
from jax.experimental.pallas import tpu as pltpu

with pltpu.force_tpu_interpret_mode():
    theirs = fp8.quantize_activations(jnp.asarray(x_MN), implementation="tpu")
print("equal to NumPy's:", np.array_equal(np.asarray(theirs.data).view(np.uint8), q_MN.view(np.uint8)))

# %% [markdown]
# ## 4. Chips that are not here
#
# The interpreter proves numbers, not that a compiler takes the kernel. The extra `aot` brings the compilers themselves:
# libtpu has Mosaic for every TPU, the CUDA plugin has Mosaic GPU and ptxas for Hopper. `chip(name).compile` runs them on any
# Linux machine and reads what they say: how much fast memory a kernel takes (VMEM on a TPU, shared memory on a GPU),
# registers per thread, and whether any are spilled.

# %%
import functools

from kernels_pallas import aot

large = jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16)  # a batch of DeepSeek-V3's hidden states
CASES = {
    "v5e": ("tpu", functools.partial(fp8.quantize_activations, implementation="tpu")),
    "tpu7x": ("tpu", functools.partial(fp8.quantize_activations, implementation="tpu")),
    "h200": ("gpu", functools.partial(fp8.quantize_activations, implementation="gpu")),
}
if (missing := aot.unavailable()) is not None:
    print(missing)
else:
    print(
        f"{'chip':6} {'compiles':8} {'VMEM':>9} {'registers':>9} {'spilled':>8} {'shared':>8}   bytes, but for registers"
    )
    for name, (_, run) in CASES.items():
        found = aot.chip(name).compile(run, large)
        said = (found.vmem_bytes, found.registers, found.spill_bytes, found.shared_memory_bytes)
        print(f"{name:6} {'yes' if found.compiled else found.error:8}", *(f"{'' if s is None else s:>9}" for s in said))

# %% [markdown]
# And yours? A block of 32 x 128 is far from what these chips like best, but it is a TPU kernel:

# %%
if aot.unavailable() is None:
    found = aot.chip("v5e").compile(quantize_pallas, jax.ShapeDtypeStruct((4096, 7168), jnp.float32))
    print("v5e:", "compiles" if found.compiled else found.error)

# %% [markdown]
# ## 5. The bench
#
# Speed is only ever measured, never derived, and always beside a named rival in the same run. Quantizing moves bytes and
# hardly computes, so the rival is a copy of as many bytes. On this machine:

# %%
from experiments.benches.fp8 import Fp8Flags, measure_ops

print(f"{'op':26} {'shape':16} {'implementation':15} {'GB/s':>6} {'share of a copy':>16}")
for row in measure_ops(Fp8Flags(max_elements=2**21, repeats=3)):
    shape = " x ".join(map(str, row["shape"]))
    print(
        f"{row['op']:26} {shape:16} {row['implementation']:15} {row['gb_per_second']:6.1f} {row['share_of_copy']:16.2f}"
    )

# %% [markdown]
# `python -m experiments.bench fp8` measures every shape of DeepSeek-V3, on the device that you have, and keeps the result
# with date, commit and versions. `python -m experiments.bench aot --op=fp8` prints the table of section 4 for all shapes.
#
# ## Where to go on
#
# * `kernels_pallas/fp8/api.py`: what the operation promises, to the last NaN.
# * `kernels_pallas/fp8/tpu.py` and `gpu.py`: the kernels, a page each.
# * `tests/kernels_pallas/test_fp8*.py`: how they are proved, against code that shares nothing with them.
# * `kernels_pallas/flash_attention/`: the same walk for an operation with a backward pass.
