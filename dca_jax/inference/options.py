"""The options of all generation functions, checked when they are set."""

import difflib
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from dca_jax.errors import InputError
from dca_jax.fields import LARGEST, shown
from dca_jax.inference.prefix import Prefix
from dca_jax.inference.sampling import Sampler

# Names that other libraries use for these options, to answer them with ours.
_SAMPLER_OPTIONS = frozenset(field.name for field in fields(Sampler))
_ELSEWHERE = {
    "max_new_tokens": (
        "max_tokens max_gen_toks max_gen_len max_length max_completion_tokens max_output_tokens "
        "num_predict"
    ),
    "stop": "stop_strings stop_sequences stop_words until",
    "stop_ids": "eos_token_id stop_token_ids stop_tokens",
    "seed": "random_seed rng key",
    "prefix": "past_key_values cache kv_cache",
    "progress": "use_tqdm verbose",
    "thinking": "enable_thinking",
}
_OURS = {theirs: ours for ours, names in _ELSEWHERE.items() for theirs in names.split()}


class OptionNames(TypedDict, total=False):
    """The fields of `Options` as keyword arguments."""

    max_new_tokens: int
    sampler: Sampler
    seed: int
    stop: Sequence[str]
    stop_ids: Collection[int]
    prefix: Prefix | None
    progress: bool | None
    thinking: bool | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generation options.

    Attributes:
        max_new_tokens: maximum number of new tokens per prompt.
        sampler: how tokens are sampled (default: greedy).
        seed: random seed for sampling, 32 bits.
        stop: strings that end the text; the text ends before them. A single string is also allowed.
        stop_ids: token ids that end the text, in addition to the model's own.
        prefix: a text that has already been read (`LLM.prefill`).
        progress: whether to show a progress bar of the prefill on stderr; None shows it for long
            prompts if stderr is a terminal.
        thinking: whether a chat model thinks before it answers, for chat templates with the
            variable `enable_thinking`, such as Qwen3's; None leaves it to the template. It is for
            conversations only: `LLM.generate` and `LLM.stream` refuse it.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    max_new_tokens: int = 256
    sampler: Sampler = Sampler()
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    prefix: Prefix | None = None
    progress: bool | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        self._set("max_new_tokens", _integer("max_new_tokens", self.max_new_tokens, 1, LARGEST))
        self._set("seed", _integer("seed", self.seed, -(2**31), LARGEST))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self._set("stop", _each("stop", stop, _stop_string))
        self._set("stop_ids", _each("stop_ids", self.stop_ids, _stop_id))
        _check_type(
            "sampler", self.sampler, Sampler, "a dca_jax.Sampler such as Sampler(top_p=0.9)"
        )
        if self.prefix is not None:
            _check_type("prefix", self.prefix, Prefix, "a result of LLM.prefill, or None")
        for name in ("progress", "thinking"):
            if getattr(self, name) is not None:
                _check_type(name, getattr(self, name), bool, "True, False or None")

    @classmethod
    def of(cls, options: "Options | None", changes: OptionNames) -> "Options":
        """`options` (default: `Options()`) with some fields changed.

        Raises:
            InputError: a name that is not a field; the message suggests the likely one.
        """
        _check_names(changes)
        if options is None:
            return cls(**changes)
        _check_type("options", options, Options, "a dca_jax.Options")
        return replace(options, **changes)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _check_names(changes: OptionNames) -> None:
    known = [field.name for field in fields(Options)]
    for name, value in changes.items():
        if name in known:
            continue
        if name in _SAMPLER_OPTIONS:
            meant = f"it belongs to the sampler: sampler=Sampler({name}={shown(value)})"
        elif name == "do_sample":
            meant = "a temperature above 0 samples: sampler=Sampler(temperature=0.7)"
        else:
            near = difflib.get_close_matches(name, [*known, *_SAMPLER_OPTIONS], n=1)
            close = _OURS.get(name, near[0] if near else None)
            close = f"sampler=Sampler({close}=...)" if close in _SAMPLER_OPTIONS else close
            meant = f"did you mean {close}?" if close else f"the options are {', '.join(known)}"
        raise InputError(f"there is no option {shown(name, quote=False)!r}; {meant}")


def _check_type(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {expected}, got {shown(value)}")


def _integer(name: str, value: Any, least: int, most: int) -> int:
    """Accepts NumPy's integers too, but not True or 1.0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or not least <= number <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {shown(value)}")
    return number


def _each(name: str, given: Any, check: Callable[[Any], Any]) -> tuple[Any, ...]:
    """A tuple of the values, each checked with `check`."""
    if not isinstance(given, Iterable):
        raise InputError(f"{name} must be a list, got {shown(given)}")
    return tuple(check(value) for value in given)


def _stop_string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(
            f"stop must contain non-empty strings, got {shown(value)}; for ids, use stop_ids"
        )
    return value


def _stop_id(value: Any) -> int:
    return _integer("stop_ids", value, 0, LARGEST)
