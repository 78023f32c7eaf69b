"""The output of github.com/NVIDIA/RULER's own generators, with stand-ins for all downloads.

    python tests/golden_ruler.py RULER_CHECKOUT

runs `scripts/data/prepare.py` of a checkout (commit c3f5e3b) for each of `CASES`, in a folder of
its own, and writes `tests/golden/ruler.json`: each prompt's checksum, answers and length. The
stand-ins below are a tokenizer (words and signs), wonderwords' lists, NLTK's sentences, the
essays, the longer list of words, SQuAD's and HotpotQA's files.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "ruler.json"
# Prefixes of other words, and words in two lists, are included on purpose.
ADJECTIVES = ["well", "well-known", "a", "big", "red", "b-c", "b", "Able", "big"]
NOUNS = ["tree", "known-tree", "c-d", "d", "Zebra", "ox", "red", "well"]
VERBS = [f"verb{n * 7919 % 9973}" for n in range(150)] + ["red", "ox"]
MORE_WORDS = {str(n): f"more{n * 104729 % 99991}" for n in range(9000)}
ESSAYS = "\n\n".join(
    f"Essay {n} is about {n * 37 % 101} things. Are there\tmore? {'No' if n % 3 else 'Yes'}! "
    f"The  {n}th one, says Mr. {chr(65 + n % 26)}, is odd."
    for n in range(120)
)
SQUAD = {
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a}: {'it is long. ' * (3 + a * p % 7)}",
                    "qas": [
                        {
                            "id": f"{a}-{p}-{q}",
                            "question": f"What is {q} of {p} in {a}?",
                            "answers": [{"text": f"answer {q}"}, {"text": f"the answer {q}"}],
                            "is_impossible": q == 1,
                        }
                        for q in range(3)
                    ],
                }
                for p in range(2 + a % 4)
            ],
        }
        for a in range(12)
    ]
}
HOTPOTQA = [
    {
        "question": f"Who is {n}?",
        "answer": f"person {n}",
        "context": [
            [f"Title {n * 3 + d}", [f"Sentence {s} of {n * 3 + d}. " for s in range(2 + d % 3)]]
            for d in range(10)
        ],
    }
    for n in range(15)
]
# Task, length and seed; below 4,096 tokens some tasks have smaller steps and lists.
CASES = [
    *[(f"niah_single_{n}", length, 42) for n in (1, 2, 3) for length in (2048, 4096)],
    *[(f"niah_multikey_{n}", length, 42) for n in (1, 2, 3) for length in (2048, 4096)],
    ("niah_multivalue", 4096, 42),
    ("niah_multiquery", 4096, 7),
    ("niah_single_1", 512, 1),
    ("niah_single_2", 8192, 7),
    *[("vt", length, seed) for length in (2048, 4096) for seed in (42, 7)],
    *[("cwe", length, seed) for length in (2048, 8192) for seed in (42, 7)],
    *[("fwe", length, seed) for length in (1000, 4096) for seed in (42, 7)],
    *[(task, length, 42) for task in ("qa_1", "qa_2") for length in (1024, 2048, 4096)],
    ("qa_1", 2048, 7),
]
# The same as a user's message, with room for a chat template (`--prepare_for_ns`).
CHAT_CASES = [(task, 2048, 42) for task in ("niah_multikey_2", "vt", "cwe", "fwe", "qa_1")]
CHAT_TEMPLATE = "[INST] {task_template} [/INST]"  # RULER's "meta-chat"
SAMPLES = 3


def tokens_of(text: str) -> list[str]:
    """The stand-in for a tokenizer: words in pieces of four letters, and every other sign."""
    return re.findall(r"\w{1,4}|[^\w\s]|\n", text)


def sentences_of(text: str) -> list[str]:
    """The stand-in for NLTK's sentences."""
    return re.split(r"(?<=[.!?]) ", text)


TOKENIZER = """
import golden_ruler
class Words:
    def text_to_tokens(self, text):
        return golden_ruler.tokens_of(text)
def select_tokenizer(kind, path):
    return Words()
"""
STUBS = {
    "wonderwords.py": """
import golden_ruler
class random_word:
    _get_words_from_text_file = {
        "nounlist.txt": golden_ruler.NOUNS,
        "adjectivelist.txt": golden_ruler.ADJECTIVES,
        "verblist.txt": golden_ruler.VERBS,
    }.__getitem__
""",
    "nltk/__init__.py": """
class data:
    find = staticmethod(lambda name: name)
""",
    "nltk/tokenize.py": "from golden_ruler import sentences_of as sent_tokenize",
    "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
}


def main(checkout: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        scripts, stubs = Path(name) / "scripts", Path(name) / "stubs"
        shutil.copytree(checkout / "scripts", scripts)
        for file, text in STUBS.items():
            (stubs / file).parent.mkdir(parents=True, exist_ok=True)
            (stubs / file).write_text(text)
        (stubs / "python").chmod(0o755)
        (scripts / "data/tokenizer.py").write_text(TOKENIZER)
        files = {"PaulGrahamEssays": {"text": ESSAYS}, "english_words": MORE_WORDS}
        files |= {"squad": SQUAD, "hotpotqa": HOTPOTQA}
        for file, content in files.items():
            (scripts / f"data/synthetic/json/{file}.json").write_text(json.dumps(content))
        found = [_run(scripts, stubs, False, *case) for case in CASES]
        found += [_run(scripts, stubs, True, *case) for case in CHAT_CASES]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case) for case in found) + "\n]\n")


def _run(
    scripts: Path, stubs: Path, chat: bool, task: str, length: int, seed: int
) -> dict[str, Any]:
    out = scripts / f"{task}-{length}-{seed}-{chat}"
    paths = os.pathsep.join([str(stubs), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    environment["PATH"] = f"{stubs}{os.pathsep}{environment['PATH']}"
    words = ["--save_dir", out, "--task", task, "--tokenizer_path", "none"]
    words += ["--max_seq_length", length, "--num_samples", SAMPLES, "--random_seed", seed]
    words += ["--prepare_for_ns", "--model_template_type", "meta-chat"] if chat else []
    command = [sys.executable, "prepare.py", *map(str, words)]
    subprocess.run(command, cwd=scripts / "data", env=environment, check=True, timeout=300)
    lines = (out / task / "validation.jsonl").read_text().splitlines()
    samples = [record(*(line[n] for n in NAMES)) for line in map(json.loads, lines)]
    assert len(samples) == SAMPLES
    return {"task": task, "length": length, "seed": seed, "chat": chat, "samples": samples}


NAMES = ("input", "answer_prefix", "outputs", "length")


def record(question: str, beginning: str, expected: list[str], length: int) -> dict[str, Any]:
    """The recorded part of a sample; its question is long."""
    checksum = hashlib.sha256(question.encode()).hexdigest()
    return {"sha256": checksum, "beginning": beginning, "expected": expected, "length": length}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
