# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # See DCA's positions and attention
#
# Dual Chunk Attention changes one thing: the positions that queries and keys are rotated to. This
# notebook draws them, shows which of three phases gives each pair of tokens its position, checks
# that short texts are read exactly as before, and looks at what a model predicts beyond its
# training context.

# %%
# Installs dca_jax where it is missing, as on Colab; CUDA's libraries too if there is a GPU.
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("dca_jax") is None:
    extra = "[cuda12]" if shutil.which("nvidia-smi") else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"dca_jax{extra}"], check=True)

# %%
# The demo model is part of the repository and of the source distribution.
from pathlib import Path

MODEL = Path("../models/demo-python-7m")
if not MODEL.exists():
    fetch = "pip download -q --no-deps --no-binary dca_jax dca_jax"
    subprocess.run([sys.executable, "-m", *fetch.split()], check=True)
    shutil.unpack_archive(next(Path().glob("dca_jax-*.tar.gz")), filter="data")
    (MODEL,) = Path().glob("dca_jax-*/models/demo-python-7m")

# %% [markdown]
# ## Relative positions
#
# A model trained on 10 tokens has seen distances from 0 to 9. Plain RoPE (left) gives 20 tokens
# distances up to 19. DCA (right) cuts the text into chunks of s = 6 and gives no query a position
# above Q = 9: this is Figure 2 of the paper, two chunks further.

# %%
import matplotlib.pyplot as plt

from dca_jax import DCAConfig
from dca_jax.planning.explain import plot_relative_positions, position_matrix

dca = DCAConfig(chunk_len=6, max_query_position=9)
figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
plot_relative_positions(20, None, axes[0])
plot_relative_positions(20, dca, axes[1])
figure

# %% [markdown]
# ## Three phases
#
# Every chunk has the key positions 0 to s - 1. What changes is the position of the query:
#
# - **intra**, keys of its own chunk: its place in the chunk, so distances are the true ones;
# - **succ**, keys of the chunk before: s more, but at most Q, so the nearest keys keep their true
#   distance;
# - **inter**, all earlier chunks: Q for every query.

# %%
import jax.numpy as jnp
import numpy as np

from dca_jax.dca import key_range

length = 20
phase = np.full((length, length), np.nan)
for number, name in enumerate(["intra", "succ", "inter"]):
    start, stop = np.asarray(key_range(jnp.arange(length)[:, None], name, dca))
    keys = np.arange(length)
    phase[(start <= keys) & (keys < stop)] = number
figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
image = axes.imshow(phase, cmap=plt.get_cmap("viridis", 3), vmin=-0.5, vmax=2.5)
figure.colorbar(image, ticks=[0, 1, 2]).ax.set_yticklabels(["intra", "succ", "inter"])
axes.set(xlabel="key j", ylabel="query i", title="phase")
axes.set(xticks=range(0, length, 2), yticks=range(0, length, 2))
figure

# %% [markdown]
# ## Exact inside the training context
#
# Where no query is held at Q, all distances are the true ones, and attention is plain attention.
# With the paper's setting for 512 tokens (s = 384, Q = 511) that is true of every text of 512
# tokens.

# %%
setting = DCAConfig.paper(512)
true_distance = position_matrix(512, None)
print(
    "every distance is the true one:", bool((position_matrix(512, setting) == true_distance).all())
)

# %%
import difflib

import dca_jax
from dca_jax.inference.documents import read_document

llm, plain = dca_jax.load(MODEL, dca=setting), dca_jax.load(MODEL, dca=None)
tokens = llm.tokenize(read_document(difflib.__file__))
inside = [tokens[:512]]
difference = np.abs(llm.logits(inside) - plain.logits(inside)).max()
print(f"largest difference of two logits: {difference:.1e}")

# %% [markdown]
# ## Beyond it
#
# The cost of each token, in nats, as the text goes on: with plain attention it rises as soon as
# distances are new to the model, with DCA it does not.

# %%
LENGTH = 4096


def nats(model, tokens):
    logits = model.logits([tokens])[0, :-1]
    largest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[:, 0]
    return total - logits[np.arange(len(logits)), tokens[1:]]


long = tokens[:LENGTH]
costs = {"DCA": nats(llm, long), "plain attention": nats(plain, long)}
for name, cost in costs.items():
    print(f"perplexity of {len(long):,} tokens with {name}: {np.exp(cost.mean()):.2f}")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
smooth = np.ones(64) / 64
for name, cost in costs.items():
    axes.plot(np.arange(len(cost) - 63) + 64, np.convolve(cost, smooth, mode="valid"), label=name)
axes.axvline(512, color="gray", linestyle="--", linewidth=0.8)
axes.set(xlabel="token", ylabel="nats, mean of 64 tokens", title="dashed: the training context")
axes.legend()
figure

# %% [markdown]
# ## The attention itself
#
# `dual_chunk_attention` takes queries and keys before rotation, and fits into a model of your
# own. Here it is beside its definition with the whole matrix of logits.

# %%
import jax

from dca_jax import RopeConfig, dual_chunk_attention
from dca_jax.dca import dense_attention, key_position
from dca_jax.rope import inverse_frequencies, rotate

query, key, value = (
    jax.random.normal(jax.random.key(seed), (1, 20, heads, 16), jnp.float32)
    for seed, heads in enumerate([4, 2, 2])
)
rope = RopeConfig(theta=10_000.0)
out = dual_chunk_attention(query, key, value, dca=dca, rope=rope)

frequencies = inverse_frequencies(rope, 16)
none = jnp.zeros(1, jnp.int32)
expected = dense_attention(
    query,
    rotate(key, key_position(jnp.arange(20)[None], dca), frequencies),
    value,
    dca=dca,
    inv_freq=frequencies,
    scale=jnp.full(1, 16**-0.5),
    offset=none,
    lengths=none + 20,
    key_offset=none,
)
print(f"largest difference: {jnp.abs(out - expected).max():.1e}")
