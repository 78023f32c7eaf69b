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
# # First steps
#
# Load a model, generate with it, ask about a text that is many times longer than its training
# context, and find out what memory a large model needs before loading it. It runs on a CPU in a
# few minutes, faster on a GPU.
#
# The model has seven million parameters and was trained on Python source, 512 tokens at a time.

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
# ## Load and generate
#
# `load` takes a Hugging Face folder, a GGUF file, or a name on the Hugging Face Hub. Without
# further arguments the model reads with the paper's Dual Chunk Attention for its training
# context.

# %%
import dca_jax

llm = dca_jax.load(MODEL)
(answer,) = llm.generate("def fibonacci(n):", max_new_tokens=40)
print(answer.text)

# %% [markdown]
# ## Read a long text
#
# `difflib` was not in the training data. `dca=None` loads the model as it was, with plain
# attention: beyond 512 tokens it meets distances between tokens that it never saw, and its
# perplexity explodes.

# %%
import difflib

from dca_jax.inference.documents import read_document

CHARACTERS = 14_000
source = read_document(difflib.__file__)[:CHARACTERS]
plain = dca_jax.load(MODEL, dca=None)
with_dca, without = llm.perplexity(source), plain.perplexity(source)
print(f"{len(llm.tokenize(source)):,} tokens; perplexity:")
print(f"{with_dca:.2f} with DCA, {without:.2f} without")

# %% [markdown]
# ## Ask about it
#
# The model is no assistant, but it learned to find a number that was hidden in a text. We hide
# one in a text of eight times its training context. The text is read once, and then asked several
# times: `prefill` keeps what has been read.

# %%
from dca_jax.evaluation.passkey import passkey_text

SENTENCES = 600
hidden = passkey_text(SENTENCES, depth=0.3, key="48213")
text, question = hidden.rsplit("\n", 1)
document = llm.prefill(text)
print(f"read {len(document.tokens):,} tokens once")
for asked in [f"\n{question}", "\nThe grass is"]:
    print(repr(asked), "->", repr(llm.generate(asked, prefix=document, max_new_tokens=6)[0].text))

# %%
print("without DCA:", repr(plain.generate(hidden, max_new_tokens=6)[0].text))

# %% [markdown]
# ## Plan memory before you load
#
# What would Llama-2-70B need to read 100k tokens on four H200s? Nothing is loaded or downloaded
# for the answer. `dca-jax plan` prints the same on the command line, for your own checkpoints
# too.

# %%
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import find_shape

shape = find_shape("llama-2-70b")
needs = plan("llama-2-70b", shape, device="h200", mesh={"tensor": 4}, context_length=100 * 1024)
for name, value in needs.facts().items():
    print(f"{name:24} {value}")
