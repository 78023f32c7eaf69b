"""Reads a cell of the study with the library's own evaluations, into its own folder."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from study_cells import IN_CONTEXT, PARTS, Cell, files_of

import dca_jax
from dca_jax.errors import InputError
from dca_jax.evaluation import few_shot, l_eval, needle, passkey, windows
from dca_jax.evaluation.examples import Choice
from dca_jax.evaluation.haystacks import Haystack
from dca_jax.evaluation.intervals import in_per_cent
from dca_jax.evaluation.results import Record, ResultLog, write_json
from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.ruler.sources import read_sources
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.documents import read_document

DONE = "done.json"  # in a cell's folder: the number of samples requested so far
SCORES = {"passkey": "found", "needle": "score", "ruler": "score", "few-shot": "f1"}


@dataclass(frozen=True, kw_only=True)
class Given:
    """The inputs of a study, from which each worker makes its reader (so it is pickled).

    Attributes:
        model: a folder or file, as for dca-jax.
        text: the text whose perplexity is measured.
        haystack: the text in which needles are hidden.
        questions: L-Eval's folder, or None.
        out: the study's folder.
        identity: facts that hold for all results: checksums of model and texts, the device.
        rows: number of prompts read together; None leaves it to the library.
        longest: tokens of the longest prompt. All prompts use a cache of that size, since programs
            are compiled for a cache size.
    """

    model: str
    text: Path
    haystack: Path
    questions: Path | None
    out: Path
    identity: Mapping[str, Any]
    dtype: str | None
    rows: int | None
    longest: int

    def __call__(self) -> Callable[[Cell], dict[str, Any]]:
        """Loads the model."""
        return Reading(self).read


class Reading:
    """Reads cells with one loaded model and its texts."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.llm = dca_jax.load(given.model, dca=None, dtype=given.dtype, weights="unpacked")
        self.files = files_of(given.questions)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Token ids of the text."""
        return np.asarray(read_text(self.llm, self.given.text).tokens, np.int32)

    @functools.cached_property
    def hay(self) -> Haystack:
        """The haystack's sentences."""
        return Haystack.of_text(read_document(self.given.haystack))

    @functools.cached_property
    def sources(self) -> Any:
        """The material of RULER's prompts."""
        return read_sources(self.given.haystack, {})[0]

    def read(self, cell: Cell) -> dict[str, Any]:
        """Reads what the cell's folder lacks; returns the result in one line.

        Raises:
            InputError: samples failed (with the first one's reason), or all are refused.
        """
        folder, task = self.given.out / cell.folder, PARTS[cell.part]
        settings = {**self.given.identity, **settings_of(cell.part)}
        files = data_files(self.files, cell.part)
        with ResultLog(folder, task, settings, files=files) as log:
            self._evaluate(cell, log)
            records = log.records
        failed = [record.error for record in records if record.error is not None]
        if failed:
            raise InputError(f"{len(failed)} of {len(records)} samples failed: {failed[0]}")
        write_json({"samples": cell.samples}, folder / DONE)
        return {"said": said(cell, records), "samples": len(records)}

    def _evaluate(self, cell: Cell, log: ResultLog) -> None:
        methods, length = [cell.method], cell.length
        asked = {"methods": methods, "batch": self.given.rows}
        prompts = {**asked, "lengths": [length], "trials": cell.samples}
        prompts["capacity"] = self.given.longest
        kind, _, choice = cell.part.partition("few-shot-")
        if kind == "perplexity":
            options = {"form": "paper", "methods": methods, "lengths": [length]}
            windows.evaluate(self.llm.model, self.tokens, log, limit=cell.samples, **options)
        elif kind.startswith("passkey"):
            how = settings_of(kind)
            passkey.evaluate(self.llm, log, depths=None, **how, **prompts)
        elif kind == "needle":
            needle.evaluate(self.llm, self.hay, log, tasks=[cell.task], chat=True, **prompts)
        elif kind == "ruler":
            ruler.evaluate(self.llm, self.sources, log, tasks=[cell.task], chat=True, **prompts)
        elif kind == "l-eval":
            files = {cell.task: self.files[cell.task]}
            options = {"files": files, "max_length": length, "limit": cell.samples, **asked}
            l_eval.evaluate(self.llm, log, chat=True, **options)
        else:
            files = {IN_CONTEXT: self.files[IN_CONTEXT]}
            pool = {"pools": files, "choice": Choice(choice)}
            options = {"files": files, "max_length": length, "limit": cell.samples, **asked}
            few_shot.evaluate(self.llm, log, **pool, **options)


def settings_of(part: str) -> dict[str, Any]:
    """Settings that the results of a part depend on, besides the model and the texts."""
    kind, _, choice = part.partition("few-shot-")
    if choice:
        return {"examples": choice}
    return {
        "perplexity": {"form": "paper", "stride": windows.STRIDES["paper"]},
        "passkey": {"form": "fitted"},
        "passkey-chat": {"form": "fitted", "chat": True},
        "passkey-paper": {"form": "paper"},
        "needle": {"chat": True},
        "ruler": {"chat": True},
        "l-eval": {"chat": True},
    }[kind]


def is_done(out: Path, cell: Cell) -> bool:
    """Whether a cell is complete, with at least this many samples."""
    path = out / cell.folder / DONE
    return path.is_file() and json.loads(path.read_text())["samples"] >= cell.samples


def said(cell: Cell, records: list[Record]) -> str:
    """The result of a cell in a few words."""
    values = [record.value for record in records if record.value is not None]
    if cell.part == "perplexity":
        return f"perplexity {math.exp(min(windows.mean_nll(records), 700.0)):.2f}"
    if cell.part == "l-eval":
        return f"{len(values)} answers"
    scores = [float(value[SCORES[PARTS[cell.part]]]) for value in values]
    return f"{in_per_cent((math.fsum(scores) / len(scores), len(scores)))} per cent"


def data_files(files: Mapping[str, Path], part: str) -> dict[str, dict[str, str]]:
    """Names and checksums of the files that a part reads."""
    if part == "l-eval":
        some = {task: path for task, path in files.items() if task in l_eval.TASKS}
    else:
        some = {IN_CONTEXT: files[IN_CONTEXT]} if part.startswith("few-shot") else {}
    return {task: {"name": p.name, "sha256": checksum(p)} for task, p in some.items()}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
