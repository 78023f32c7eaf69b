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
# # Finetune and compare
#
# DCA needs no training, and gains from some. This notebook finetunes the demo model on texts of
# four times its training context, with DCA on, and measures before and after: perplexity of a
# text that it was not trained on, and passkeys. It takes some minutes on a CPU, less on a GPU.

# %%
# Installs dca_jax where it is missing, as on Colab; CUDA's libraries too if there is a GPU.
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("dca_jax") is None:
    extras = "[train,cuda12]" if shutil.which("nvidia-smi") else "[train]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"dca_jax{extras}"], check=True)

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
# ## Data
#
# Modules of Python's standard library that the demo model never saw: a few to train on, one to
# test with. A `.txt` file is one long text; dialogues would be JSON (`{"messages": [...]}` and
# other forms), and only what the assistant says would be trained on.

# %%
import argparse
import ast
import difflib
import doctest
import inspect
import mailbox
import subprocess
import tarfile
import typing

MODULES = [argparse, ast, doctest, inspect, mailbox, subprocess, tarfile, typing]
WORK = Path("finetune-and-compare")
WORK.mkdir(exist_ok=True)
files = []
for module in MODULES:
    files.append(WORK / f"{module.__name__}.txt")
    files[-1].write_text(Path(module.__file__).read_text(encoding="utf-8"), encoding="utf-8")

# %% [markdown]
# ## Before

# %%
import dca_jax
from dca_jax.evaluation.passkey import passkey_grid
from dca_jax.inference.documents import read_document

TESTED = 4096
PASSKEYS = [1024, 4096]


def measure(llm):
    tokens = llm.tokenize(read_document(difflib.__file__))[:TESTED]
    grid = passkey_grid(llm, PASSKEYS, [0.25, 0.75], trials=2)
    print(f"perplexity of {len(tokens):,} tokens: {llm.perplexity(tokens):.2f}")
    for length, found in zip(PASSKEYS, grid.accuracy.mean(axis=1), strict=True):
        print(f"passkeys found in {length:,} tokens: {found:.0%}")


before = dca_jax.load(MODEL)
measure(before)

# %% [markdown]
# ## Finetune
#
# Every setting of `dca-jax finetune` is a field of `Settings`. The run's folder has its settings,
# losses and checkpoints; running the cell again resumes or, once it is done, returns at once.

# %%
from dca_jax.finetune.run import finetune
from dca_jax.finetune.settings import DataFile, Settings

settings = Settings(
    model=str(MODEL),
    data=tuple(DataFile(str(file)) for file in files),
    output=str(WORK / "run"),
    template="llama-2",  # for dialogues, of which there are none here
    length=2048,
    steps=30,
    learning_rate=2e-4,
    warmup=0.1,
    dtype="float32",
)
folder = finetune(settings)
print("wrote", folder)

# %%
import json

import matplotlib.pyplot as plt

lines = (WORK / "run" / "metrics.jsonl").read_text().splitlines()
losses = [row["loss"] for line in lines if "loss" in (row := json.loads(line))]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(range(1, len(losses) + 1), losses)
axes.set(xlabel="update", ylabel="loss, nats a token")
figure

# %% [markdown]
# ## After

# %%
after = dca_jax.load(folder)
measure(after)

# %% [markdown]
# The finetuned folder is read by every command (`dca-jax generate`, `eval`, `serve`), and
# `dca-jax convert` makes a Hugging Face folder of it. `docs/lab/finetuning.md` has the results of a
# longer training of this model, with the exact gradient and with that of released code.
