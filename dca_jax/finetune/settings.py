"""The settings of a finetuning run as a flat table, from a YAML file or from flags.

The defaults are the paper's recipe (LongChat's hyperparameters) where it has one.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import numpy as np

from dca_jax.config import LORA_TARGETS
from dca_jax.errors import InputError
from dca_jax.fields import LARGEST, shown
from dca_jax.finetune.packing import PACKS
from dca_jax.lengths import parse_tokens
from dca_jax.model import REMAT
from dca_jax.products.packed import STORED

BASES = ("dtype", "int8", "int4", STORED)
EXPORTS = ("orbax", "hf")
DTYPES = ("bfloat16", "float32")
REPORTS = ("tensorboard", "wandb")
LARGEST_UPDATE = 2**27  # tokens, including padding: the host builds all rows of an update at once
WEIGHTS = (1e-6, 1e3)  # range of a file's weight: outside it, an epoch would be empty or endless


class DataFile(NamedTuple):
    """A file of dialogues.

    Attributes:
        weight: number of times that each of its dialogues is used per epoch.
        min_tokens: shorter dialogues are dropped.
    """

    path: str
    weight: float = 1.0
    min_tokens: int = 0


Files = tuple[DataFile, ...]


class Range(NamedTuple):
    """Allowed range of a number: at least `least`, above `above`, below `below`, and finite."""

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return not (
            (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}"
        if self.below is not None:
            return f"from {self.least:g} to below {self.below:g}"
        return f"at least {self.least:g}"


FROM_0, FROM_1, POSITIVE, SHARE = Range(0), Range(1), Range(above=0), Range(0, below=1)


def _option(
    default: Any,
    help: str,
    *,
    resumable: bool = False,
    choices: Any = None,
    tokens: bool = False,
    within: Range | None = None,
) -> Any:
    metadata = {"help": help, "resumable": resumable, "choices": choices, "tokens": tokens}
    return dataclasses.field(default=default, metadata=metadata | {"within": within})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A finetuning run. Each field is described next to it, as shown by `--help`.

    Fields marked `resumable` may change when a run is resumed; the others determine its losses.
    Fields marked `tokens` may be written as 16k.

    Raises:
        InputError: an invalid value; the message says what is allowed.
    """

    model: str = _option(
        "", "A Hugging Face folder, a converted folder, or a name on the Hugging Face Hub."
    )
    output: str = _option("", "Folder of the run; repeat the command to resume it.")
    # --- dialogues
    data: Files = _option(
        (),
        "JSON or JSONL file of dialogues; FILE=2 uses each dialogue twice per epoch. May be "
        "repeated; in YAML a file may also have min_tokens.",
    )
    eval_data: Files = _option((), "Held-out dialogues to evaluate the loss on.")
    template: str = _option(
        "chat",
        "Chat template of the dialogues: chat (the tokenizer's own), llama-2, chunkllama (as in "
        "the paper's code, including its errors), or a .jinja file.",
    )
    length: int = _option(16_384, "Row length in tokens.", tokens=True, within=Range(2))
    pack: str = _option(
        "cut",
        "How dialogues are packed into rows: cut (joined, then cut every LENGTH tokens), whole (as "
        "many whole ones as fit), segments (the same, without attention between dialogues) or none "
        "(one per row).",
        choices=PACKS,
    )
    gpt4_only: bool = _option(False, "Keep only dialogues marked as answered by GPT-4.")
    # --- attention
    method: str = _option(
        "auto",
        "Method: auto (the checkpoint's own setting, else the paper's DCA), none, or dca with a "
        "setting, as in dca:chunkllama or dca:3072,4095.",
    )
    # --- optimization (AdamW)
    steps: int | None = _option(
        None,
        "Number of updates (default: from EPOCHS). A larger number than before lengthens a run.",
        resumable=True,
        within=FROM_1,
    )
    epochs: float = _option(1.0, "Number of passes over the data.", resumable=True, within=POSITIVE)
    batch: int = _option(1, "Rows per batch, over all devices.", within=FROM_1)
    accumulate: int = _option(
        1,
        "Batches per update; gradients are weighted by their number of tokens.",
        within=FROM_1,
    )
    learning_rate: float = _option(
        2e-5, "Peak learning rate; decays to zero with a cosine schedule.", within=POSITIVE
    )
    warmup: float = _option(
        0.03,
        "Fraction of the updates used for linear warmup of the learning rate.",
        within=SHARE,
    )
    weight_decay: float = _option(0.0, "Weight decay of the matrices.", within=FROM_0)
    beta1: float = _option(0.9, "AdamW's beta1.", within=SHARE)
    beta2: float = _option(0.999, "AdamW's beta2.", within=SHARE)
    clip: float = _option(1.0, "Maximum norm of the gradient.", within=POSITIVE)
    seed: int = _option(0, "Seed for data order and LoRA initialization.", within=FROM_0)
    # --- LoRA
    lora_rank: int = _option(
        0, "Train LoRA adapters of this rank; 0 trains all weights.", within=FROM_0
    )
    lora_alpha: float = _option(32.0, "LoRA's scale is alpha / rank.", within=POSITIVE)
    lora_targets: tuple[str, ...] = _option(
        LORA_TARGETS,
        "Projections with adapters. May be repeated.",
    )
    adapter: str = _option(
        "",
        "Folder of a LoRA adapter to start from, from PEFT or another run; its rank, alpha and "
        "targets are taken.",
    )
    base: str = _option(
        "dtype",
        "Format of the frozen weights with LoRA: the run's dtype, quantized to int8 or int4, or as "
        "in a quantized checkpoint (stored).",
        choices=BASES,
    )
    export: str = _option(
        "orbax",
        "Format of OUTPUT/model: a converted folder (orbax), which every command here can load on "
        "any mesh, or a Hugging Face folder (hf), which transformers can load too.",
        choices=EXPORTS,
        resumable=True,
    )
    # --- devices
    mesh: str = _option(
        "", "Device mesh: fsdp=4, or context=2,fsdp=2 (default: one device).", resumable=True
    )
    dtype: str = _option("bfloat16", "Dtype of activations.", choices=DTYPES)
    state: str = _option(
        "float32",
        "Dtype of trained weights, their gradients and AdamW's moments; bfloat16 takes half the "
        "memory and uses stochastic rounding.",
        choices=DTYPES,
    )
    remat: str = _option(
        "attention",
        "What to save for the backward pass: each layer's input (layer), also the attention output "
        "(attention), or also the projections' outputs (products). Saving more takes more memory "
        "and less time.",
        resumable=True,
        choices=tuple(REMAT),
    )
    # --- the run
    save_every: int = _option(200, "Updates between checkpoints.", resumable=True, within=FROM_1)
    keep: int = _option(2, "Number of checkpoints to keep.", resumable=True, within=FROM_1)
    eval_every: int = _option(200, "Updates between evaluations.", resumable=True, within=FROM_1)
    report: tuple[str, ...] = _option(
        (),
        "Where to report besides metrics.jsonl: tensorboard, wandb. May be repeated.",
        resumable=True,
        choices=REPORTS,
    )

    def __post_init__(self) -> None:
        for name in ("model", "output", "data"):
            if not getattr(self, name):
                raise InputError(f"{name} is not given; name it in the file, or as --{name}")
        for row in fields(self):
            self._check_number(row)
            self._check_choice(row)
        tokens = self.batch * self.accumulate * self.length
        if tokens > LARGEST_UPDATE:
            raise InputError(
                f"an update of {self.accumulate} x {self.batch} rows of {self.length} tokens has "
                f"{tokens:,}; at most {LARGEST_UPDATE:,} are made at once: lower accumulate, batch "
                "or length"
            )
        for file in (*self.data, *self.eval_data):
            least, most = WEIGHTS
            if not (least <= file.weight <= most and 0 <= file.min_tokens <= LARGEST):
                raise InputError(
                    f"{file.path} must have a weight from {least:g} to {most:g} and min_tokens "
                    f"from 0, got {file.weight} and {shown(file.min_tokens)}"
                )
        if self.adapter and self.lora_rank:
            raise InputError("give adapter or lora_rank: an adapter has a rank of its own")
        lora = self.lora_rank or self.adapter
        if self.base != "dtype" and not lora:
            raise InputError(
                f"base {self.base} goes with LoRA: weights that are trained are no integers"
            )
        if self.state != "float32" and lora:
            raise InputError(
                "state bfloat16 is for training all weights; LoRA's adapters are small, and stay "
                "float32"
            )

    def _check_number(self, row: dataclasses.Field) -> None:
        value, within = getattr(self, row.name), row.metadata["within"]
        kinds = get_args(row.type) or (row.type,)
        if within is None or (value is None and NoneType in kinds):
            return
        if isinstance(value, bool) or not isinstance(value, int if int in kinds else int | float):
            raise InputError(f"{row.name} is {KINDS[kinds[0]]}, got {shown(value)}")
        if int in kinds and value > LARGEST:
            raise InputError(f"{row.name} must be at most {LARGEST}, got {shown(value)}")
        # Floats as the devices have them: 1e39 is infinite there, and 0.99999999 is 1.
        here = _float32(value) if float in kinds else value
        if float in kinds and not math.isfinite(here):
            raise InputError(f"{row.name} must be finite, in float32 too, got {shown(value)}")
        if not within.holds(here):
            raise InputError(f"{row.name} must be {within}, got {shown(value)}")

    def _check_choice(self, row: dataclasses.Field) -> None:
        value, choices = getattr(self, row.name), row.metadata["choices"]
        for one in value if isinstance(value, tuple) else (value,):
            if choices is not None and one not in choices:
                raise InputError(f"{row.name} is one of {', '.join(choices)}; got {shown(one)}")

    def as_yaml(self) -> dict[str, Any]:
        """All fields as plain values, including defaults, for `read_settings` to read back."""
        values = dataclasses.asdict(self)
        for name in ("data", "eval_data"):  # a list, for a file may be given more than once
            files = (file._asdict() for file in getattr(self, name))
            values[name] = [{file.pop("path"): file} for file in files]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def lasts_as_long_as(self, other: "Settings") -> bool:
        """Whether both have the same `steps`, or derive them from the same `epochs`."""
        ours, theirs = ((s.steps, s.epochs if s.steps is None else 0) for s in (self, other))
        return ours == theirs

    def differing(self, other: "Settings") -> list[str]:
        """Names of the fields whose differences prevent resuming with the other settings."""
        return [
            row.name
            for row in fields(self)
            if not row.metadata["resumable"]
            and row.name != "output"  # a run's folder may have moved
            and getattr(self, row.name) != getattr(other, row.name)
        ]


def read_settings(path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a YAML file, overridden by flags.

    Args:
        path: a file with a mapping of fields; None uses only flags.
        flags: values by field, as strings or plain values; None for a flag that was not given.

    Raises:
        InputError: a missing file, not a YAML mapping, an unknown field, or a value of the wrong
            type or out of range.
    """
    values = {} if path is None else _read_yaml(path)
    values |= {name: value for name, value in flags.items() if value is not None}
    known = {row.name: row for row in fields(Settings)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InputError(f"{path}: there is no setting {shown(name)}{hint}")
    return Settings(**{name: _value(known[name], value) for name, value in values.items()})


def _read_yaml(path: Path) -> dict[str, Any]:
    from dca_jax.finetune.yaml_files import read_yaml  # not needed with only flags

    return read_yaml(path)


def _value(row: dataclasses.Field, value: Any) -> Any:
    """A field's value from YAML's or a flag's: 2e-5 is a text to YAML, and a 1 may be a float."""
    if row.type == Files:
        return _files(row.name, value)
    if row.type == tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise InputError(f"{row.name} is a list of names, got {shown(value)}")
        return tuple(values)
    kinds: tuple[Any, ...] = get_args(row.type) or (row.type,)
    if value is None:
        if NoneType in kinds:
            return None
        raise InputError(f"{row.name} is empty; leave the line out to have its default")
    kind: Any = kinds[0]
    if row.metadata["tokens"] and isinstance(value, str):
        return parse_tokens(value)
    try:
        if isinstance(value, bool) != (kind is bool):
            raise ValueError
        if kind is str and not isinstance(value, str):
            raise ValueError
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{row.name} is {KINDS[kind]}, got {shown(value)}") from None


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text (a number needs quotes)",
}


def _float32(value: float) -> float:
    """A number as float32 rounds it; infinite where it is too large."""
    if abs(value) > 1e300:  # an integer may be too large for any float
        return float("inf")
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _files(name: str, value: Any) -> Files:
    """From {file: weight}, {file: {weight, min_tokens}}, or texts "file" and "file=weight".

    Or from a list of these.
    """
    values = [value] if isinstance(value, str | Mapping) else value
    kinds = str | Mapping
    if not isinstance(values, list | tuple) or not all(isinstance(v, kinds) for v in values):
        raise InputError(f"{name} is a list of files, or lines 'file: weight'; got {shown(value)}")
    files: list[DataFile] = []
    for one in values:
        if isinstance(one, Mapping):
            files += [_file(str(path), of_file) for path, of_file in one.items()]
        else:
            files.append(_file_with_weight(one))
    return tuple(files)


def _file(path: str, value: Any) -> DataFile:
    own = {} if value is None else {"weight": value}
    options: Any = value if isinstance(value, Mapping) else own
    try:
        found = DataFile(path, **options)
        weight, least = found.weight, found.min_tokens
        if isinstance(weight, bool) or isinstance(least, bool):
            raise TypeError
        least = parse_tokens(least) if isinstance(least, str) else int(least)
        if least != found.min_tokens and not isinstance(found.min_tokens, str):
            raise ValueError
        return DataFile(path, float(weight), least)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{path} has a weight, or weight and min_tokens, each a number; got {shown(value)}"
        ) from None


def _file_with_weight(text: str) -> DataFile:
    path, equals, weight = text.rpartition("=")
    try:
        return DataFile(path, float(weight)) if equals else DataFile(text)
    except ValueError:  # a file whose name has one
        return DataFile(text)
