"""lm-eval's long-context tasks to their scores, offline, beside its own model for transformers."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion_helpers import make_tiny
from tiny_llm import byte_level_tokenizer, save_tokenizer

from dca_jax.evaluation import needle
from dca_jax.evaluation.passkey import FILLER

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
TASKS = Path(lm_eval.__file__).parent / "tasks"
QASPER = [
    {"context": "The ship sails. " * n, "question": "Who sails?", "answers": ["nobody", "a ship"]}
    for n in (30, 60)
]
TREC = [
    {
        "context": "Question: Who?\nType: Person\n" * n,
        "question": "Question: Where?\nType:",
        "answers": ["Place"],
        "all_classes": ["Place", "Person", "Number"],
    }
    for n in (10, 20)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(ours, theirs, their folder); of RULER's words each is a token, as for a real tokenizer."""
    from lm_eval.models.huggingface import HFLM

    from dca_jax.lm_eval import DcaJaxLM

    folder = tmp_path_factory.mktemp("lm")
    parts = [*FILLER, needle.NEEDLE, *needle.NEEDLES, *needle.ONE_NEEDLE, *needle.VARIABLES]
    tokenizer = byte_level_tokenizer(600, [" ".join(parts)] * 2)
    make_tiny(
        folder,
        dtype=np.dtype(np.float32),
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=2048,
    )
    save_tokenizer(folder, tokenizer)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    return DcaJaxLM(str(folder), method="rope", dtype="float32", max_length=2048), theirs, folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def run(model: Any, task: str, folder: Path, **metadata: Any) -> tuple[dict, list[dict]]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    found = simple_evaluate(
        model, tasks=[task], limit=2, bootstrap_iters=0, task_manager=manager, log_samples=True
    )
    return found["results"][task], found["samples"][task]


def said_by(theirs: Any, samples: list[dict]) -> list[list[str]]:
    """What lm-eval's own model answers to the prompts of these samples."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance("generate_until", {}, tuple(sample["arguments"][0]), number)
        for number, sample in enumerate(samples)
    ]
    return [[text] for text in theirs.generate_until(requests, disable_tqdm=True)]


@pytest.fixture
def ruler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RULER's tasks, which when imported fetch a splitter of sentences and sort 7M words."""
    import nltk
    import wonderwords

    class Words:
        def __init__(self) -> None:
            self._categories = {"nouns": ["ship", "whale"], "adjectives": ["old"], "verbs": []}

    (tmp_path / "tokenizers/punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(wonderwords, "RandomWord", Words)
    from lm_eval.tasks.ruler import prepare_niah

    make = prepare_niah.generate_samples  # 500 of them
    monkeypatch.setattr(
        prepare_niah, "generate_samples", lambda *a, **k: make(*a, **(k | {"num_samples": 2}))
    )
    return TASKS / "ruler"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["niah_single_1", "ruler_vt"])
def test_ruler(pair: tuple, ruler: Path, task: str) -> None:
    ours, theirs, folder = pair
    score, samples = run(ours, task, ruler, max_seq_lengths=[1024], tokenizer=str(folder))
    assert len(samples) == 2
    assert [sample["filtered_resps"] for sample in samples] == said_by(theirs, samples)
    for sample in samples:  # the prompt is as long as was asked for, and its answer is in it
        prompt, _ = sample["arguments"][0]
        assert 700 < len(ours.tok_encode(prompt)) <= 1024
        assert all(value in prompt for value in sample["doc"]["outputs"])
    assert score["1024,none"] == by_hand(samples)


def by_hand(samples: list[dict]) -> float:
    """RULER's string_match_all."""
    shares = [
        np.mean([value.lower() in sample["filtered_resps"][0].lower() for value in wanted])
        for sample in samples
        for wanted in [sample["doc"]["outputs"]]
    ]
    return float(np.mean(shares))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "metric"),
    [("qasper", QASPER, "qa_f1_score"), ("trec", TREC, "classification_score")],
)
def test_longbench(pair: tuple, tmp_path: Path, name: str, rows: list, metric: str) -> None:
    """Of two documents, one answer is what lm-eval's own model says to it: half of the score."""
    ours, theirs, _ = pair
    data = tmp_path / "data.jsonl"
    (tmp_path / "task.yaml").write_text(
        f"include: {TASKS}/longbench/{name}.yaml\ntask: local_{name}\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"  cache_dir: {tmp_path}/cache\n"
    )

    def write(lines: list[dict]) -> None:
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(rows)
    _, samples = run(ours, f"local_{name}", tmp_path)
    answers = said_by(theirs, samples)
    assert [sample["filtered_resps"] for sample in samples] == answers
    right = answers[0][0].strip()
    write([rows[0] | {"answers": [right], "all_classes": [right, "Place"]}, rows[1]])
    score, _ = run(ours, f"local_{name}", tmp_path)
    for key in (metric, "score"):
        assert score[f"{key},none"] == pytest.approx(0.5)
