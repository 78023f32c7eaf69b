"""RULER's prompts and settings.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv
2404.06654). The sentences of the prompts, the numbers of new tokens and the settings of the
thirteen tasks are those of github.com/NVIDIA/RULER (scripts/data/synthetic/constants.py and
scripts/synthetic.yaml), Copyright (c) 2024, NVIDIA CORPORATION, licensed under the Apache License,
Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0). They are data that must be reproduced
exactly; the programs that use them here are not NVIDIA's.
"""

from typing import Literal, NamedTuple

SEED = 42
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

HIDDEN = "One of the special magic {kind} for {key} is: {value}."


class Wording(NamedTuple):
    """The prompt around a task's text.

    Attributes:
        question: the question, with {context} and {query}.
        beginning: the beginning of the answer, with {query}.
        new_tokens: maximum tokens of the answer, which are part of the length.
    """

    question: str
    beginning: str
    new_tokens: int


NEEDLES = Wording(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
    128,
)
ONE_NEEDLE = Wording(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} "
    "for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
    128,
)
VARIABLES = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {query}, they are: ",
    30,
)
COMMON_WORDS = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
CODED_WORDS = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
DOCUMENTS = Wording(
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:",
    32,
)


class NeedleSetting(NamedTuple):
    """The needles and the haystack of a task.

    Attributes:
        haystack: RULER's noise, essays, or other needles.
        key, value: kinds of keys and values.
        keys, values, queries: number of keys, of values per key, and of keys in the question.
    """

    haystack: Literal["noise", "essays", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def wording(self) -> Wording:
        """The wording for one answer or for several."""
        return ONE_NEEDLE if self.values * self.queries == 1 else NEEDLES


NEEDLE_TASKS = {
    "niah_single_1": NeedleSetting("noise"),
    "niah_single_2": NeedleSetting("essays"),
    "niah_single_3": NeedleSetting("essays", value="uuids"),
    "niah_multikey_1": NeedleSetting("essays", keys=4),
    "niah_multikey_2": NeedleSetting("needles"),
    "niah_multikey_3": NeedleSetting("needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleSetting("essays", values=4),
    "niah_multiquery": NeedleSetting("essays", keys=4, queries=4),
}
WORDINGS: dict[str, Wording] = {
    **{name: setting.wording for name, setting in NEEDLE_TASKS.items()},
    "vt": VARIABLES,
    "cwe": COMMON_WORDS,
    "fwe": CODED_WORDS,
    "qa_1": DOCUMENTS,
    "qa_2": DOCUMENTS,
}
TASKS = tuple(WORDINGS)
ESSAY_TASKS = tuple(name for name, one in NEEDLE_TASKS.items() if one.haystack == "essays")
