"""A real chat model from a GGUF file: SmolLM2-135M-Instruct in Q4_1, against transformers.

Skipped where the file is absent: `make demo-chat` fetches it, or `DCA_JAX_SMOLLM2` names it.
"""

import os
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dca_jax
from dca_jax.inference.tokenizer import decode, encode

FILE = Path(os.environ.get("DCA_JAX_SMOLLM2") or "outputs/models/SmolLM2-135M-Instruct.Q4_1.gguf")
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is absent (make demo-chat)")

QUESTION = [{"role": "user", "content": "Name three cities in France, and what they are for."}]
# transformers has no rule for "smollm" and takes GPT-2's. The model's own tokenizer splits off each
# digit first: two spaces before one are a piece, and a space is none with the bytes of a "½".
DIFFERENT = re.compile(r"\s\s\d")


@pytest.fixture(scope="module")
def llm() -> dca_jax.LLM:
    return dca_jax.load(FILE, dca=None, dtype="float32")


def test_logits_and_greedy_tokens_are_those_of_transformers(llm):
    reference = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32, local_files_only=True
    )
    prompt = llm.apply_chat_template(QUESTION)
    with torch.no_grad():
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=48, do_sample=False, pad_token_id=2
        )[0].tolist()
        logits = reference(torch.tensor([theirs])).logits.numpy()
    ours = np.asarray(llm.logits([theirs]))
    print(f"largest difference of {len(theirs)} rows of logits: {np.abs(ours - logits).max():.1e}")
    assert np.abs(ours - logits).max() < 1e-3
    made = llm.generate(prompt, max_new_tokens=48)[0].tokens
    assert list(made) == theirs[len(prompt) :]


def lines() -> list[str]:
    """A thousand lines: prose, code, numbers, other scripts, and random characters."""
    rng = random.Random(0)
    texts = [Path(__file__).read_text(), Path("README.md").read_text()]
    words = [word for text in texts for word in text.split(" ") if word]
    words += (
        "12 3.14 ½ naïve 海は広い мир 🙂 don't <|im_start|> <repo_name> \t ١٢٣ e\u0301 C++".split(
            " "
        )
    )
    found = [" ".join(rng.choices(words, k=rng.randrange(1, 20))) for _ in range(800)]
    ranges = [(32, 127), (160, 0x250), (0x370, 0x590), (0x4E00, 0x9FFF), (0x1F300, 0x1F600)]
    for _ in range(200):
        some = [rng.choice(ranges) for _ in range(rng.randrange(1, 60))]
        found.append("".join(chr(rng.randrange(*each)) for each in some))
    return found


def test_ids_of_a_thousand_lines(llm: Any):
    theirs = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name, local_files_only=True)
    compared = 0
    for line in lines():
        ids = encode(llm.tokenizer, line)
        assert decode(llm.tokenizer, ids, skip_special_tokens=False) == line
        others = any(unicodedata.category(c)[0] == "N" and not c.isascii() for c in line)
        if not DIFFERENT.search(line) and not others:
            assert ids == theirs(line).input_ids, repr(line)
            compared += 1
    assert compared > 900
    assert llm.stop_ids == {2}
