"""The training data of a run: reads and renders its files, or loads their stored rendering."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain

from dca_jax.distributed import from_primary
from dca_jax.errors import InputError
from dca_jax.fields import LARGEST
from dca_jax.finetune.data import Rows, Source, evaluation_rows, rows_per_epoch
from dca_jax.finetune.data import training_rows as rows_of
from dca_jax.finetune.dialogues import read_dialogues
from dca_jax.finetune.rendered_files import Kept, keep, kept, key_of
from dca_jax.finetune.rendering import render_all
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.setup import Setup

RENDERED = "rendered"


@dataclass(frozen=True)
class Inputs:
    """The dialogues to train on, and the batches of held-out ones.

    Attributes:
        rendered: the rendering of each file, by the key of `rendered_files`.
    """

    data: list[Source]
    held_out: list[Rows]
    rendered: Mapping[str, Kept]

    def keep(self, output: Path) -> None:
        """Stores the rendered dialogues in the run's folder for reuse."""
        for key, found in self.rendered.items():
            keep(output / RENDERED, key, found)


def read_inputs(setup: Setup) -> Inputs:
    """Reads and renders a run's files; prints what was dropped, and why.

    Raises:
        InputError: a file that cannot be trained on, or ids outside the vocabulary.
    """
    settings, rendered, told = setup.settings, {}, []
    row = None if settings.pack == "cut" else settings.length

    def read(file: DataFile, cut: int | None) -> Source:
        key, found = _rendered(setup, file, cut)
        dialogues, counts = rendered[key] = found
        tokens = sum(len(dialogue.tokens) for dialogue in dialogues)
        notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items())
        told.append(f"{file.path}: {len(dialogues):,} samples, {tokens:,} tokens{notes}")
        return Source(Path(file.path).name, dialogues, file.weight)

    data = [read(file, row) for file in settings.data]
    held_out = [d for f in settings.eval_data for d in read(f, settings.length).dialogues]
    from_primary(lambda: print("\n".join(told)))
    for source in data:
        _check_ids(source, setup.config.vocab_size)
    batches = []
    if held_out:
        options = {"length": settings.length, "batch": settings.batch, "pad_id": setup.pad_id}
        batches = evaluation_rows(held_out, **options)
    return Inputs(data, batches, rendered)


def _rendered(setup: Setup, file: DataFile, cut: int | None) -> tuple[str, Kept]:
    """A file's dialogues as tokens, with counts of dropped ones, and the key for storing them."""
    settings, path = setup.settings, Path(file.path)
    if not path.is_file():
        read_dialogues(path)  # reports the error
    decides = {"gpt4_only": settings.gpt4_only, "min_tokens": file.min_tokens, "cut": cut}
    template = setup.chat_template or settings.template
    key = key_of(path, setup.tokenizer, template, decides)
    found = kept(Path(settings.output) / RENDERED, key)
    if found is not None:
        return key, found
    dialogues, dropped = read_dialogues(path, gpt4_only=settings.gpt4_only)
    rendered, counts = render_all(
        path.name,
        dialogues,
        setup.tokenizer,
        template=settings.template,
        min_tokens=file.min_tokens,
        cut=cut,
    )
    return key, (rendered, dropped | counts)


def _check_ids(source: Source, vocab_size: int) -> None:
    largest = max((int(d.tokens.max()) for d in source.dialogues), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{source.name}: the tokenizer gives the id {largest}, and the model knows ids below "
            f"{vocab_size}; is this the model's own tokenizer?"
        )


def training_rows(setup: Setup, data: Sequence[Source]) -> grain.IterDataset:
    """The rows of all updates, with one batch per update."""
    settings = setup.settings
    return rows_of(
        data,
        length=settings.length,
        batch=settings.batch * settings.accumulate,
        seed=settings.seed,
        pack=settings.pack,
        pad_id=setup.pad_id,
    )


def number_of_updates(settings: Settings, data: Sequence[Source]) -> int:
    """The number of updates from a run's `steps` or `epochs`.

    Raises:
        InputError: the number is too large.
    """
    if settings.steps is not None:
        return settings.steps
    epoch = rows_per_epoch(data, length=settings.length, pack=settings.pack, seed=settings.seed)
    steps = math.ceil(settings.epochs * epoch / (settings.batch * settings.accumulate))
    if steps > LARGEST:
        raise InputError(
            f"{settings.epochs:g} epochs of {epoch:,} rows are {steps:,} updates; at most "
            f"{LARGEST:,} are counted: give fewer epochs, or steps"
        )
    return steps
