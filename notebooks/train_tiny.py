# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A small DeepSeek, all of it
#
# This notebook trains a language model of 10 million parameters with every part of DeepSeek-V3.2: multi-head latent attention
# (MLA), a mixture of experts whose loads are balanced by a bias, multi-token prediction (MTP), and sparse attention (DSA) in
# its two stages. It learns Python from Python's own standard library, so nothing is downloaded but packages. It takes under
# ten minutes on two CPU cores. It is made for a GPU of any age too, where plain XLA does all of it, but has not run on one yet.

# %%
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("experiments") is None:
    # The clone that this notebook lies in; on Colab give "git+https://" and the repository's address.
    SOURCE = pathlib.Path.cwd().parent.as_uri()
    extras = "plot,gpu" if pathlib.Path("/proc/driver/nvidia").exists() else "plot"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"mdl[{extras}] @ {SOURCE}"], check=True)

# %%
import dataclasses
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

from configs import tiny, tiny_dsa
from experiments.cli import format_config
from experiments.data.files import TextFilesConfig
from experiments.metrics import read_metrics
from experiments.train import train

STEPS = int(os.environ.get("NOTEBOOK_STEPS", 200))  # of the dense model; the two sparse stages take a quarter each
CORPUS = os.environ.get("NOTEBOOK_CORPUS")  # a glob of text files of your own; none: Python's standard library
RUNS = pathlib.Path(tempfile.mkdtemp(prefix="runs_"))  # give a folder that stays to resume where you left
print("jax", jax.__version__, "on", jax.devices()[0].device_kind)

# %% [markdown]
# ## 1. The model with dense attention
#
# A config is a tree of frozen dataclasses. `configs/tiny.py` makes one; to change a field is to replace it. The same fields are
# flags of `python -m experiments.run`, such as `--config.train.num_steps=200`.

# %%
config = tiny.get_config()
data = config.data
if CORPUS is not None:
    data = dataclasses.replace(data, source=TextFilesConfig(paths=(CORPUS,), validation_fraction=0.2))
config = dataclasses.replace(
    config,
    data=data,
    train=dataclasses.replace(config.train, num_steps=STEPS),
    eval=dataclasses.replace(config.eval, every=max(STEPS // 4, 1), sample_prompt="def "),
    log=dataclasses.replace(config.log, every=max(STEPS // 10, 1)),
)
print(format_config(config.model))

# %% [markdown]
# Training prints tokens per second, MFU (the share of what this device can compute) and the time that is left. Stop it and run
# the cell again, and it goes on from its last checkpoint, bit for bit.

# %%
DENSE = RUNS / "dense"
_ = train(config, DENSE)


# %% [markdown]
# ## 2. Curves
#
# Every step is a line of `metrics.jsonl`. Bits per byte of held-out modules is what compressors are judged by too: `gzip -9`
# needs 1.98 for these.


# %%
def curve(run, name):
    """Steps, and what they say under this name."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line.get(name) is not None]
    return [line["step"] for line in lines], np.array([line[name] for line in lines])


def figure(*titles, height=2.8):
    fig, axes = plt.subplots(1, len(titles), figsize=(4.2 * len(titles), height), dpi=90, squeeze=False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    return fig, axes[0]


fig, (left, right) = figure("training loss, nats per token", "validation, bits per byte")
left.plot(*curve(DENSE, "loss/main"), label="next token", lw=1)
left.plot(*curve(DENSE, "loss/mtp_1"), label="the one after (MTP)", lw=1)
left.legend()
right.plot(*curve(DENSE, "val/bpb"), marker="o")
right.axhline(1.98, color="gray", ls="--", label="gzip -9")
right.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# **Experts.** A router sends each token to 4 of 16 experts. No loss pushes towards balance (but for a tiny one within a
# sequence): after each step, a bias of an expert that had too little is raised a bit, and of one that had too much lowered
# (DeepSeek-V3, section 2.1.2), which takes some hundred steps. How much more than its share the busiest expert of each layer
# gets; the first layer has no experts:

# %%
steps, violation = curve(DENSE, "load/by_layer/max_violation")
fig, (ax,) = figure("load of the busiest expert / mean - 1")
layers = [f"layer {layer + 1}" for layer in range(config.model.num_prefix_layers, config.model.num_hidden_layers)]
for label, values in zip([*layers, "MTP"], violation.T, strict=True):
    ax.plot(steps, values, lw=1, label=label)
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# **MTP.** A module of its own predicts the token after the next. When the main model agrees, decoding gets two tokens in one
# step (`--draft=mtp`). The share of held-out positions at which it does:

# %%
steps, acceptance = curve(DENSE, "val/acceptance/mtp_1")
print("\n".join(f"step {step:4}: {100 * share:.0f} %" for step, share in zip(steps, acceptance, strict=True)))

# %% [markdown]
# ## 3. Sparse attention, in two stages
#
# DSA gives each query a small *indexer* that scores all keys cheaply, and lets attention see only the best 64 of up to 256. First
# the indexers learn alone to foresee where dense attention looks (all else is frozen); then attention becomes sparse and
# everything is trained (DeepSeek-V3.2-Exp report, section 2.1).

# %%
WARM, SPARSE = RUNS / "warmup", RUNS / "sparse"
for stage, source, workdir in (("warmup", DENSE, WARM), ("sparse", WARM, SPARSE)):
    stage_config = tiny_dsa.get_config(stage)
    num_steps = max(STEPS // 4, 1)
    _ = train(
        dataclasses.replace(
            stage_config,
            init_from=str(source),
            data=data,
            train=dataclasses.replace(stage_config.train, num_steps=num_steps),
            eval=dataclasses.replace(stage_config.eval, every=num_steps, sample_prompt=None),
            log=dataclasses.replace(stage_config.log, every=max(num_steps // 5, 1)),
        ),
        workdir,
    )

# %%
fig, (left, right) = figure("indexers, warm-up: KL to attention", "validation, bits per byte")
left.plot(*curve(WARM, "indexer/kl"), label="trained")
left.plot(*curve(WARM, "indexer/uniform"), color="gray", ls="--", label="all keys alike")
left.legend()
for name, run in {"dense": DENSE, "sparse": SPARSE}.items():
    steps, bpb = curve(run, "val/bpb")
    right.plot(np.array(steps) + (STEPS if run == SPARSE else 0), bpb, marker="o", label=name)
right.legend()
fig.tight_layout()
plt.show()
recall = curve(SPARSE, "val/indexer/recall")[1]
print(f"of dense attention, the selected keys hold {100 * recall[-1]:.0f} % on held-out text")

# %% [markdown]
# Which keys does the first layer select for one function? A row is a query (a token of the text, from top to bottom), a column
# a key; black is selected. The first 64 rows see everything there is.

# %%
from experiments.loading import load_model

loaded = load_model(SPARSE)
text = (pathlib.Path(os.__file__).parent / "bisect.py").read_text()
ids = np.array([loaded.tokenizer.encode(text, bos=True)[:192]], np.int32)


@jax.jit
def selected_by_the_first_layer(arrays, ids_BT):
    model = loaded.pure.merge(arrays["params"], arrays["buffers"])
    positions_BT = jax.numpy.broadcast_to(jax.numpy.arange(ids_BT.shape[1], dtype="int32"), ids_BT.shape)
    context = model.context(positions_BT, jax.numpy.ones_like(ids_BT))
    block = model.prefix["0"]
    return block.attention(block.attention_norm(model.embed(ids_BT)), context).selected_BTW


places_TW = np.asarray(selected_by_the_first_layer(jax.device_get(loaded.arrays), ids)[0])  # without a mesh
length = len(ids[0])
is_selected_TS = np.zeros((length, length + 1), bool)  # the last column takes what is no key
is_selected_TS[np.arange(length)[:, None], places_TW] = True
fig, ax = plt.subplots(figsize=(4.6, 4.6), dpi=90)
ax.imshow(~is_selected_TS[:, :-1], cmap="gray", interpolation="nearest")
ax.set(xlabel="key", ylabel="query", title="keys selected in the first layer")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Completing text

# %%
from experiments import generate

for prompt in ("def fibonacci(n):\n", "import os\n\nclass "):
    generate.main(
        [f"--checkpoint={SPARSE}", f"--prompt={prompt}", "--max_new_tokens=48", "--temperature=0.7", "--seed=0"]
    )

# %% [markdown]
# ## 5. Out to Hugging Face, and back
#
# `convert` writes safetensors and a `config.json` that transformers reads as DeepSeek-V3.2. Loaded back, the model gives the
# same logits.

# %%
from experiments import convert
from experiments.scoring import score

EXPORTED = RUNS / "hugging_face"
convert.main([f"--from={SPARSE}", f"--to={EXPORTED}"])
print(sorted(file.name for file in EXPORTED.iterdir()))
again = load_model(EXPORTED)
difference = np.abs(score(loaded, ids, 1).logits_BTV - score(again, ids, 1).logits_BTV).max()
print("largest difference of a logit:", difference)

# %% [markdown]
# From here: `configs/moe_1b.py` for one large GPU, `docs/add_your_attention.md` to put your own idea in, `kernel_room.ipynb` for
# what lies below.
