"""What RULER's prompts are made of: word lists, essays, and question-answering files of the user's.

Words are those of the package wonderwords (of the extra `eval`), which RULER's generators import,
too. Nothing is downloaded here: the essays, SQuAD, HotpotQA and the longer list of words are files
that the user names.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dca_jax.errors import InputError
from dca_jax.evaluation.benchmark_files import check_text
from dca_jax.evaluation.haystacks import sentences_of
from dca_jax.fields import shown
from dca_jax.inference.documents import read_document
from dca_jax.text_files import parse_json, read_text_file

LISTS = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


class WordLists(NamedTuple):
    """Those of wonderwords."""

    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]

    @property
    def all(self) -> list[str]:
        """Every word once, in order."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})


def word_lists() -> WordLists:
    """Reads the lists of wonderwords.

    Raises:
        InputError: it is not installed, or not as known here.
    """
    try:
        import wonderwords  # of the extra `eval`
    except ModuleNotFoundError:
        raise InputError(
            "RULER draws its words from wonderwords, which is not installed; "
            "`pip install 'dca_jax[eval]'` has it"
        ) from None
    folder = Path(wonderwords.__file__).parent / "assets"
    lists = {name: read_text_file(folder / file).splitlines() for name, file in LISTS.items()}
    return WordLists(**{name: [line.rstrip() for line in some] for name, some in lists.items()})


class KeyWords(Sequence[str]):
    """Every adjective with every noun (some six millions), in order, each once.

    The items are those of `sorted({f"{a}-{n}" for a in adjectives for n in nouns})`; the list
    itself would take seconds to sort, and half a gigabyte.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        # Beginnings that have one in common, such as "well-" and "well-known-", lie among another.
        self._blocks: list[tuple[str, list[str] | None]] = []
        beginnings = sorted({f"{adjective}-" for adjective in adjectives})
        start = 0
        while start < len(beginnings):
            first, end = beginnings[start], start + 1
            while end < len(beginnings) and beginnings[end].startswith(first):
                end += 1
            alike = beginnings[start:end]
            mixed = len(alike) > 1 and sorted({one + n for one in alike for n in self._nouns})
            self._blocks.append((first, mixed or None))
            start = end
        sizes = (len(self._nouns if mixed is None else mixed) for _, mixed in self._blocks)
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        block = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[block - 1] if block else 0)
        first, mixed = self._blocks[block]
        return first + self._nouns[place] if mixed is None else mixed[place]


def read_more_words(path: Path) -> list[str]:
    """The words of RULER's english_words.json, an object of them.

    Raises:
        InputError: another file.
    """
    found = parse_json(read_text_file(path), f"{path}")
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise InputError(f"{path} is not a JSON object of words like RULER's english_words.json")
    return list(found.values())


# --- essays ------------------------------------------------------------------------------------


class Essays:
    """A long text whose first words are haystacks, and begin anew where they end.

    Args:
        text: any.
        split: cuts a text into its sentences.
    """

    def __init__(self, text: str, split: Callable[[str], list[str]]) -> None:
        self.words = re.sub(r"\s+", " ", text).split(" ")
        self._split = split
        self._last: tuple[int, list[str]] = 0, []  # most samples have as many words as the last

    def sentences(self, count: int) -> list[str]:
        """The sentences of the first `count` words."""
        if self._last[0] != count:
            words = self.words * -(-count // len(self.words))
            self._last = count, self._split(" ".join(words[:count]).strip())
        return self._last[1]


def read_essays(path: Path) -> str:
    """The text of RULER's PaulGrahamEssays.json, or of any text file or PDF.

    Raises:
        InputError: no such file, or no text in it.
    """
    text = read_document(path)
    if path.suffix == ".json":
        found = parse_json(text, f"{path}")
        text = found.get("text") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path} has no text, as RULER's PaulGrahamEssays.json has")
        check_text(text, f"{path}: text")
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def sentence_splitter() -> tuple[str, Callable[[str], list[str]]]:
    """What cuts a text into sentences, and its name: RULER's where it is, else our own rule.

    RULER's is NLTK's "punkt", whose data have to be downloaded. Needles lie between sentences, so
    where these end decides little else.
    """
    try:
        import nltk  # of the extra `eval`

        nltk.data.find("tokenizers/punkt_tab/english/")
    except (ImportError, LookupError):
        return "full stops", sentences_of
    return "punkt", nltk.tokenize.sent_tokenize


# --- questions about documents -----------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        question: its text.
        answers: any of them is right.
        own: numbers of the documents that come with it.
        near: of those that stand beside it in the file, and come before all others.
    """

    question: str
    answers: list[str]
    own: list[int]
    near: list[int]


class Questions(NamedTuple):
    """Questions in the order of a file, and all its documents, each once, in order."""

    asked: list[Asked]
    documents: list[str]


def read_squad(path: Path) -> Questions:
    """The questions of SQuAD 2.0's dev-v2.0.json that have an answer.

    Raises:
        InputError: another file.
    """

    def read(found: Any) -> Questions:
        articles = found["data"]
        documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
        numbers = {text: number for number, text in enumerate(documents)}
        asked = []
        for article in articles:
            paragraphs = article["paragraphs"]
            beside = [numbers[p["context"]] for p in paragraphs]
            for paragraph in paragraphs:
                own = numbers[paragraph["context"]]
                near = [number for number in beside if number != own]
                asked += [
                    Asked(one["question"], [a["text"] for a in one["answers"]], [own], near)
                    for one in paragraph["qas"]
                    if not one["is_impossible"]
                ]
        return Questions(asked, documents)

    return _read_questions(path, "SQuAD 2.0's dev-v2.0.json", read)


def read_hotpotqa(path: Path) -> Questions:
    """The questions of HotpotQA's hotpot_dev_distractor_v1.json.

    Raises:
        InputError: another file.
    """

    def read(found: Any) -> Questions:
        texts = [[f"{title}\n{''.join(parts)}" for title, parts in one["context"]] for one in found]
        documents = sorted(set(itertools.chain.from_iterable(texts)))
        numbers = {text: number for number, text in enumerate(documents)}
        asked = [
            Asked(one["question"], [one["answer"]], [numbers[text] for text in own], [])
            for one, own in zip(found, texts, strict=True)
        ]
        return Questions(asked, documents)

    return _read_questions(path, "HotpotQA's hotpot_dev_distractor_v1.json", read)


def _read_questions(path: Path, name: str, read: Callable[[Any], Questions]) -> Questions:
    found = parse_json(read_text_file(path), f"{path}")
    try:
        questions = read(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = shown(f"{type(error).__name__}: {error}", quote=False)
        raise InputError(f"{path} is not of the form of {name} ({reason})") from None
    for asked in questions.asked:
        for text in (asked.question, *asked.answers):
            check_text(text, f"{path}: a question or answer")
        if not asked.answers or not all(text.strip() for text in asked.answers):
            raise InputError(f"{path}: the question {shown(asked.question)} has no answer")
    if not questions.asked:
        raise InputError(f"{path} has no question with an answer")
    for text in questions.documents:
        check_text(text, f"{path}: a document")
    return questions


# --- all of them -------------------------------------------------------------------------------

READERS: Mapping[str, Callable[[Path], Questions]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the prompts of a run are made of.

    Attributes:
        words: the lists that keys and lists are drawn of.
        more_words: for longer lists; None: not given.
        essays: the haystack of six tasks; None: not given.
        questions: by task, where a file was given.
    """

    words: WordLists
    more_words: list[str] | None
    essays: Essays | None
    questions: Mapping[str, Questions]


def read_sources(haystack: Path | None, files: Mapping[str, Path]) -> tuple[Sources, str]:
    """Reads what the user gave.

    Args:
        haystack: essays, or any long text.
        files: by task: qa_1, qa_2, and cwe's longer list of words.

    Returns:
        The sources, and how sentences are told apart.

    Raises:
        InputError: a task that has no file, a bad file, or no wonderwords.
    """
    known = (*READERS, "cwe")
    for task in files:
        if task not in known:
            raise InputError(
                f"RULER's task {task} has no file; those that have: {', '.join(known)}"
            )
    name, split = sentence_splitter()
    sources = Sources(
        words=word_lists(),
        more_words=read_more_words(files["cwe"]) if "cwe" in files else None,
        essays=None if haystack is None else Essays(read_essays(haystack), split),
        questions={task: read(files[task]) for task, read in READERS.items() if task in files},
    )
    return sources, name
