"""The scores of SCROLLS (Shaham et al., arXiv 2201.03533): F1, exact match and ROUGE, from 0 to 1.

As in its `metrics/scrolls.py`, an answer is compared with several references, and the best one
counts. ROUGE is the f-measure of Google's `rouge-score` (the extra `eval`), without stemming.
SCROLLS first splits texts into sentences with NLTK, one per line. Only rougeLsum depends on this,
and the score, the geometric mean of ROUGE-1, -2 and -L, does not include it, so it is omitted here.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dca_jax.errors import InputError

ROUGE = ("rouge1", "rouge2", "rougeL")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str, *, lower: bool = True) -> str:
    """An answer without punctuation, articles and superfluous white space."""
    bare = (text.lower() if lower else text).translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, both normalized."""
    return float(normalized(answer) in map(normalized, references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The word-level F1 of an answer against the best reference."""
    return max(_f1(normalized(answer).split(), normalized(r).split()) for r in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    same = sum((Counter(answer) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, each against the best reference for it.

    Raises:
        InputError: `rouge-score` is not installed.
    """
    scorer = _rouge_scorer()
    found = [scorer.score(reference, answer) for reference in references]
    return {name: max(scores[name].fmeasure for scores in found) for name in ROUGE}


def geometric_mean(scores: Mapping[str, float]) -> float:
    """SCROLLS' score: the geometric mean of ROUGE-1, -2 and -L, each averaged over all answers."""
    product = 1.0
    for name in ROUGE:
        product *= scores[name]
    return product ** (1 / len(ROUGE))


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError(
            "ROUGE needs the package rouge-score: pip install 'dca_jax[eval]'"
        ) from error
    return RougeScorer(list(ROUGE), use_stemmer=False)


# The values recorded for an answer, by measure.
MEASURES: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "f1": lambda answer, references: {"f1": f1(answer, references)},
    "exact_match": lambda answer, references: {"exact_match": exact_match(answer, references)},
    "rouge": rouge,
}


def names_of(measure: str) -> tuple[str, ...]:
    """Names of the values that `MEASURES` returns for an answer: three for ROUGE, else one."""
    return ROUGE if measure == "rouge" else (measure,)


def score(measure: str, values: Sequence[Mapping[str, Any]]) -> float:
    """The score of many answers in per cent, from the values that `MEASURES` returns for each."""
    names = names_of(measure)
    means = {name: 100 * sum(value[name] for value in values) / len(values) for name in names}
    return geometric_mean(means) if measure == "rouge" else means[measure]
