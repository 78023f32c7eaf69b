"""Time of a multiple-choice task by lm-eval: questions with four choices about one long document.

python benchmarks/shared_context.py --model models/demo-python-7m --length 16k
"""

import argparse
import time
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

import dca_jax
from dca_jax.lengths import parse_tokens
from dca_jax.lm_eval import DcaJaxLM

CHOICES = (" nothing", " a list of names", " the sum of its arguments", " an error")


def requests(model: Any, length: int, questions: int) -> list[Instance]:
    """Questions about a document of `length` tokens, which is this package's own code."""
    folder = Path(dca_jax.__file__).parent
    code = "\n".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    document = model.tokenizer.decode(model.tok_encode(code, add_special_tokens=False)[:length])
    asked = [
        (f"{document}\n\nQuestion {number}: what does function {number} return?\nAnswer:", choice)
        for number in range(questions)
        for choice in CHOICES
    ]
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)]


def main() -> None:
    """Runs the task twice, the second time without compiling; prints CPU time for busy machines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/demo-python-7m")
    parser.add_argument("--length", default="16k", help="tokens of the document")
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--method", default="dca")
    chosen = parser.parse_args()
    make: Any = DcaJaxLM  # lm-eval's decorator hides its type from type checkers
    model = make(chosen.model, method=chosen.method)
    asked = requests(model, parse_tokens(chosen.length), chosen.questions)
    for name in ("with compiling", "again"):
        begin, work = time.perf_counter(), time.process_time()
        found = model.loglikelihood(asked, disable_tqdm=True)
        seconds, work = time.perf_counter() - begin, time.process_time() - work
        print(f"{len(asked)} requests, {name}: {seconds:.1f} s ({work:.1f} s of all cores)")
    print("log-likelihoods:", ", ".join(f"{value:.4f}" for value, _ in found))


if __name__ == "__main__":
    main()
