"""Multiple needles in a haystack and chains of variables, after RULER.

Hsieh et al. (arXiv 2404.06654, github.com/NVIDIA/RULER). Prompts, numbers of new tokens (which are
part of the length) and scoring are RULER's: the share of the expected strings that occur anywhere
in the answer, ignoring case. The words of the keys, the seeds and the sentence splitting (at full
stops) are different, and the haystack is any text (default: RULER's noise). Places are drawn as in
RULER: one of forty even depths in a text, or any line of noise.

    single        one needle; at random depths, or on a grid of them   (niah_single_1, _2)
    multi-key     one needle, and three more as distractors            (niah_multikey_1)
    multi-value   one key with four values, all in the answer          (niah_multivalue)
    multi-query   a question for four keys together                    (niah_multiquery)
    variables     VAR A = 12345, VAR B = VAR A ...: find all five      (vt)

"variables" begins with a worked example in noise, of about 500 tokens.

RULER's *effective length* of a model is the greatest length at which its mean over the tasks is at
least 85.6, the score of Llama2-7B-Chat at 4k. RULER has 13 tasks, so a mean over some of these five
is a different figure on the same scale. `dca_jax.evaluation.ruler` has all 13 with RULER's seeds.
"""

import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.grids import accuracy_table, mean_by
from dca_jax.evaluation.haystacks import Haystack, largest_fitting
from dca_jax.evaluation.results import Record, ResultLog
from dca_jax.evaluation.tables import Outcome, Table, number
from dca_jax.evaluation.tables import tokens as tokens_text
from dca_jax.evaluation.texts import encode
from dca_jax.inference.llm import LLM

THRESHOLD = 85.6  # per cent
HOPS = 4
EXAMPLE_TOKENS = 500  # of the worked example, unless its five lines of noise have more

NEEDLE = "One of the special magic numbers for {key} is: {value}."
NEEDLES = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic "
    "numbers for {query} mentioned in the provided text?",
    " The special magic numbers for {query} mentioned in the provided text are",
)
ONE_NEEDLE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n{context}\nWhat is the special magic number for "
    "{query} mentioned in the provided text?",
    " The special magic number for {query} mentioned in the provided text is",
)
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    f"{HOPS + 1} variables are assigned the value {{query}}, they are: ",
)
ADJECTIVES = (
    "amber brave calm clever crisp dusty eager early faint fancy fierce gentle giant golden hollow "
    "humble icy jolly keen late lively lonely loud lucky mellow merry misty modest narrow noble "
    "odd pale plain proud quick quiet rapid rough rusty salty shiny silent sleepy smooth solid "
    "steep stormy sturdy sunny swift tender tidy tiny vivid warm wild windy wise witty young"
).split()
NOUNS = (
    "acorn anchor apron badge barrel basin beacon bottle branch bucket button candle canyon carpet "
    "castle cellar copper cradle engine feather fiddle garden glacier hammer harbor hedge helmet "
    "island jacket kettle ladder lantern lemon locket marble meadow mirror needle orchard paddle "
    "pebble pepper pillow pocket ribbon saddle shovel signal spoon stable tunnel turnip valley "
    "velvet violin wagon walnut willow window"
).split()


class Hidden(NamedTuple):
    """The hidden content of a sample, and its question.

    Attributes:
        needles: the hidden sentences in order.
        template: the question with {context} and {query}, and the beginning of the answer.
        expected: the strings that the answer should contain.
        example: another sample, shown with its answer before the question.
    """

    needles: list[str]
    template: tuple[str, str]
    query: str
    expected: list[str]
    example: "Hidden | None" = None


def hidden_numbers(
    rng: np.random.Generator, *, keys: int = 1, values: int = 1, queries: int = 1
) -> Hidden:
    """Keys with values (seven-digit numbers), and a question for the values of some keys."""
    pairs = rng.choice(len(ADJECTIVES) * len(NOUNS), keys, replace=False)
    words = [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in pairs]
    numbers = rng.choice(9_000_000, (keys, values), replace=False) + 1_000_000
    needles = [
        NEEDLE.format(key=word, value=value)
        for word, row in zip(words, numbers, strict=True)
        for value in row
    ]
    asked = rng.choice(keys, queries, replace=False)
    names = [words[n] for n in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if queries > 1 else names[0]
    return Hidden(
        needles=[needles[n] for n in rng.permutation(len(needles))],
        template=ONE_NEEDLE if queries * values == 1 else NEEDLES,
        query=query,
        expected=[str(value) for n in asked for value in numbers[n]],
    )


def hidden_variables(rng: np.random.Generator) -> Hidden:
    """A chain of variables: the first is a five-digit number, each other equals the previous one.

    The example's names have three letters, as in RULER.
    """
    return _chain(rng, 5)._replace(example=_chain(rng, 3))


def _chain(rng: np.random.Generator, letters: int) -> Hidden:
    alphabet = list(string.ascii_uppercase)
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choice(alphabet, letters))
        names += [] if name in names else [name]
    value = str(rng.integers(10_000, 99_999))
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    return Hidden(needles=chain, template=VARIABLES, query=value, expected=names)


# For each task: its hidden content, and its number of new tokens.
TASKS: dict[str, tuple[Callable[[np.random.Generator], Hidden], int]] = {
    "single": (hidden_numbers, 128),
    "multi-key": (functools.partial(hidden_numbers, keys=4), 128),
    "multi-value": (functools.partial(hidden_numbers, values=4), 128),
    "multi-query": (functools.partial(hidden_numbers, keys=4, queries=4), 128),
    "variables": (hidden_variables, 30),
}


FORM = Form(
    key={"method": str, "task": tuple(TASKS), "length": int, "depth": float, "trial": int},
    value={"score": float, "tokens": int},
    settings={"trained_length": int},
    optional=frozenset({"depth"}),
)


def score(answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings in an answer, from 0 to 1 (string_match_all)."""
    said = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).lower()
    return sum(text.lower() in said for text in expected) / len(expected)


# --- the task ----------------------------------------------------------------------------------


def evaluate(
    llm: LLM,
    haystack: Haystack,
    log: ResultLog,
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] | None = None,
    trials: int = 10,
    chat: bool = False,
    batch: int | None = None,
    capacity: int = 0,
) -> None:
    """Asks `trials` questions about hidden needles at every length and task.

    Args:
        tasks: names in `TASKS`.
        lengths: maximum numbers of tokens of prompt and answer together.
        depths: depths of the needle of "single", from 0 to 1; None for random ones, as in all
            other tasks.
        trials: number of samples of each length (and depth).
        chat: whether to send the question as a user's message, followed by the answer's beginning.
        batch, capacity: as in `ask`.

    Raises:
        InputError: a task is unknown, a depth is invalid, there are no trials, or `ask` raises.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is not known; expected one of {', '.join(TASKS)}")
    if not tasks or not lengths or trials < 1 or not all(0 <= d <= 1 for d in depths or ()):
        raise InputError("needles need a task, a length, a trial, and depths between 0 and 1")
    if chat:
        llm.apply_chat_template([{"role": "user", "content": "?"}])  # raises without a template
    for nth, task in enumerate(tasks, start=1):
        gridded = task == "single" and depths is not None
        samples = [
            Sample(
                key={"task": task, "length": length, **place, "trial": trial},
                length=length,
                question=functools.partial(
                    _question, llm, haystack, task, length, place.get("depth"), trial, chat
                ),
            )
            for length in lengths
            for place in ([{"depth": depth} for depth in depths or ()] if gridded else [{}])
            for trial in range(trials)
        ]
        ask(
            llm,
            samples,
            log,
            name=f"needle: {task} ({nth} of {len(tasks)})",
            methods=methods,
            max_new_tokens=TASKS[task][1],
            batch=batch,
            capacity=capacity,
        )


def _question(
    llm: LLM,
    haystack: Haystack,
    task: str,
    length: int,
    depth: float | None,
    trial: int,
    chat: bool,
) -> Question:
    hide, new_tokens = TASKS[task]
    place = -1 if depth is None else round(depth * 1_000_000)
    rng = np.random.default_rng([list(TASKS).index(task), length, place + 1, trial])
    hidden = hide(rng)
    depths = haystack.places(len(hidden.needles), int(rng.integers(2**32)))
    example = _worked(llm, hidden.example, rng)

    def prompt(units: int) -> list[int]:
        at = depths(units) if depth is None else [depth]
        text, beginning = _asked(hidden, haystack.with_needles(units, hidden.needles, at))
        text = example + text
        if not chat:
            return llm.tokenize(text + beginning)
        message = llm.apply_chat_template([{"role": "user", "content": text}])
        return [*message, *encode(llm, beginning)]

    room = length - new_tokens
    sample = encode(llm, haystack.joiner.join(haystack.units[:50]))
    guess = room * min(50, len(haystack.units)) // len(sample)
    units = largest_fitting(lambda n: len(prompt(n)), room, guess)

    def judge(said: Answer) -> dict[str, Any]:
        return {"score": score(said.text, hidden.expected), "expected": hidden.expected}

    return Question(prompt(units), judge)


def _asked(hidden: Hidden, context: str) -> tuple[str, str]:
    """The question with its context, and the beginning of the answer."""
    text, beginning = (part.format(context=context, query=hidden.query) for part in hidden.template)
    return text, beginning


def _worked(llm: LLM, example: Hidden | None, rng: np.random.Generator) -> str:
    """An example with its answer, in as much noise as in RULER; "" if there is none."""
    if example is None:
        return ""
    noise = Haystack.noise()
    depths = noise.places(len(example.needles), int(rng.integers(2**32)))

    def text(lines: int) -> str:
        noisy = noise.with_needles(lines, example.needles, depths(lines))
        return "".join(_asked(example, noisy)) + " ".join(example.expected) + "\n\n"

    fitting = (n for n in range(20, 5, -5) if len(encode(llm, text(n))) <= EXAMPLE_TOKENS)
    return text(next(fitting, 5))


# --- results -----------------------------------------------------------------------------------


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The greatest length whose score (per cent) reaches the threshold; None if none does.

    Scores are rounded to one digit, as in RULER's table, where 85.6 is enough.
    """
    enough = (length for length, mean in scores.items() if round(mean, 1) >= threshold)
    return max(enough, default=None)


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Scores by task, method and length, their means over the tasks, and the effective lengths."""
    del paper_model  # the paper has none of these tasks
    tasks = [task for task in TASKS if any(record.key["task"] == task for record in records)]
    parts = {
        task: accuracy_table(
            [record for record in records if record.key["task"] == task],
            "score",
            title=f"Found: {task}",
            trained_length=settings["trained_length"],
            depth="depth of the needle",
        )
        for task in tasks
    }
    scores: dict[str, Any] = {task: part.scores for task, part in parts.items()}
    pictures = {
        f"{task}_{name}": draw
        for task, part in parts.items()
        for name, draw in part.pictures.items()
    }
    tables = [table for part in parts.values() for table in part.tables]
    if records:
        means = _means(records)
        scores["mean"] = {
            method: {
                "per_cent": {str(length): mean for length, mean in row.items()},
                "effective_length": effective_length(row),
            }
            for method, row in means.items()
        }
        tables.append(_mean_table(means, tasks))
    return Outcome(scores=scores, tables=tables, pictures=pictures)


def _means(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """{method: {length: mean over the tasks, per cent}} where all tasks have results."""
    cells = mean_by(records, "score", "method", "length", "task")
    tasks = {task for _, _, task in cells}
    rows: dict[str, dict[int, float]] = {}
    for method, length in sorted({cell[:2] for cell in cells}, key=lambda cell: cell[1]):
        found = [cells[method, length, t][0] for t in tasks if (method, length, t) in cells]
        row = rows.setdefault(method, {})
        if len(found) == len(tasks):
            row[length] = 100 * sum(found) / len(found)
    return rows


def _mean_table(means: Mapping[str, Mapping[int, float]], tasks: Sequence[str]) -> Table:
    lengths = sorted({length for row in means.values() for length in row})
    rows = []
    for method, row in means.items():
        effective = effective_length(row)
        shown = "none" if effective is None else tokens_text(effective)
        rows.append([method, shown, *(number(row.get(length), 1) for length in lengths)])
    return Table(
        title=f"Mean over {', '.join(tasks)} (per cent)",
        header=["method", "effective length", *map(tokens_text, lengths)],
        rows=rows,
        notes=[f"Effective: the greatest length with at least {THRESHOLD}, as in RULER."],
    )
