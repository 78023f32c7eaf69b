"""Sampling the next token from the logits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from dca_jax.errors import InputError

OFF = 2**31 - 1  # a `top_k` larger than any vocabulary, which keeps all tokens


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples tokens from logits, with the filters of `transformers` in the same order.

    It is a pytree for `jax.jit`: the set of active filters is its structure, and their numbers are
    leaves. So changing the temperature does not recompile, and an inactive filter costs nothing.
    `traced` makes all settings leaves, so that one program works for every sampler. Leaves may also
    be arrays with one number per row (`of_rows`).

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, which ignores `top_k`, `top_p` and
            `min_p`.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least p.
        min_p: keep the tokens at least p times as likely as the most likely one.
        repetition_penalty: the logit of a token already in the text, prompt included, is divided
            by this if positive and multiplied by it if negative (arXiv 1909.05858); 1 is off.
    """

    temperature: float | int = 0.0
    top_k: int | None = None
    top_p: float | int | None = None
    min_p: float | int | None = None
    repetition_penalty: float | int = 1.0

    def __post_init__(self) -> None:
        # Below 1e-4 the division would overflow float32, and sampling is greedy in effect.
        self._check("temperature", "0 (greedy) or at least 0.0001", lambda t: t == 0 or t >= 1e-4)
        self._check("repetition_penalty", "a positive number", lambda r: r > 0)
        if self.top_p is not None:
            self._check("top_p", "above 0 and at most 1, or None", lambda p: 0 < p <= 1)
        if self.min_p is not None:
            self._check("min_p", "between 0 and 1, or None", lambda p: 0 <= p <= 1)
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
            raise InputError(f"top_k must be a positive integer, or None, got {k!r}")
        object.__setattr__(self, "top_k", None if k is None else min(int(k), OFF))

    def _check(self, name: str, allowed: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = isinstance(value, Real) and not isinstance(value, bool)  # includes NumPy's numbers
        found = float(value) if number else math.nan
        if not (math.isfinite(found) and holds(found)):
            raise InputError(f"{name} must be {allowed}, got {value!r}")
        object.__setattr__(self, name, found)  # an integer would recompile

    def traced(self) -> "Sampler":
        """The same sampler with NumPy numbers for all settings, including inactive ones.

        Under `jax.jit` all such samplers have the same structure and use the same program, which
        skips inactive filters at run time. `sample` then needs `seen`.
        """
        numbers = (
            np.float32(self.temperature),
            np.int32(OFF if self.top_k is None else self.top_k),
            np.float32(1 if self.top_p is None else self.top_p),
            np.float32(0 if self.min_p is None else self.min_p),
            np.float32(self.repetition_penalty),
        )
        return self.tree_unflatten(None, numbers)

    def of_programs(self) -> "Sampler":
        """The same sampler in one of the two forms for which programs are compiled.

        They are greedy decoding without a penalty, which compiles in half a second less and is what
        most processes do, and every other sampler (`traced`).
        """
        return Sampler() if self.is_greedy and not self.penalizes else self.traced()

    @classmethod
    def of_rows(cls, samplers: Sequence["Sampler"]) -> "Sampler":
        """A `traced` sampler for a batch with a different sampler per row; settings are arrays.

        Each row's result is the same as with its own sampler.
        """
        traced = [one.traced().tree_flatten()[0] for one in samplers]
        return cls.tree_unflatten(None, tuple(map(np.stack, zip(*traced, strict=True))))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without a key. Static under jit.

        It is False for a traced temperature, whatever its value.
        """
        return isinstance(self.temperature, (int, float)) and self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether `sample` needs the tokens seen so far. Static under jit."""
        penalty = self.repetition_penalty
        return not (isinstance(penalty, (int, float)) and penalty == 1)

    def sample(
        self,
        logits: Float[Array, "B V"],
        key: Key[Array, " B"] | None,
        seen: Bool[Array, "B V"] | None = None,
    ) -> Int[Array, " B"]:
        """One token for each row, int32.

        Args:
            logits: float32.
            key: one key per row, so that a row's token does not depend on the other rows; needed
                unless `is_greedy`.
            seen: the tokens in each row; needed if and only if `penalizes`.
        """
        if self.penalizes:
            assert seen is not None, "a repetition penalty needs the tokens seen so far"
            logits = penalized(logits, seen, self.repetition_penalty)
        if self.is_greedy:
            return _most_likely(logits)
        assert key is not None, "only greedy decoding needs no key"

        def draw(logits: Array) -> Array:
            filtered = self.filtered(logits)
            return jax.vmap(jax.random.categorical)(key, filtered).astype(jnp.int32)

        is_greedy = jnp.asarray(self.temperature, jnp.float32) == 0
        if is_greedy.ndim == 0:
            return jax.lax.cond(is_greedy, _most_likely, draw, logits)
        token = jax.lax.cond(jnp.all(is_greedy), _most_likely, draw, logits)
        return jnp.where(is_greedy, _most_likely(logits), token)

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits for sampling: divided by the temperature, and -inf for removed tokens."""
        temperature = _column(self.temperature, logits.dtype)
        logits = logits / jnp.where(temperature == 0, 1, temperature)  # a greedy row among others
        if self.top_k is not None or self.top_p is not None:
            top_k = _column(OFF if self.top_k is None else self.top_k, jnp.int32)
            top_p = _column(1 if self.top_p is None else self.top_p, logits.dtype)
            off = jnp.all((top_k >= logits.shape[-1]) & (top_p >= 1))
            logits = jax.lax.cond(off, lambda *x: x[0], _keep_top, logits, top_k, top_p)
        if self.min_p is not None:
            # p / p_max = exp(logit - logit_max), so no softmax is needed.
            relative = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            logits = jnp.where(relative < _column(self.min_p, logits.dtype), -jnp.inf, logits)
        return logits

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Numbers as leaves; inactive settings as None, which is structure."""
        temperature = None if self.is_greedy else self.temperature
        penalty = self.repetition_penalty if self.penalizes else None
        return (temperature, self.top_k, self.top_p, self.min_p, penalty), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, ...]) -> "Sampler":
        """Inverse of `tree_flatten`; leaves may be tracers, so they are not validated again."""
        sampler = object.__new__(cls)
        for field, leaf in zip(fields(cls), leaves, strict=True):
            off = leaf is None and field.default is not None
            object.__setattr__(sampler, field.name, field.default if off else leaf)
        return sampler


def penalized(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    penalty: float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, " B"],
) -> Float[Array, "B V"]:
    """Makes the tokens in `seen` less likely (penalty above 1) or more (below 1)."""
    penalty = _column(penalty, logits.dtype)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _column(number: Any, dtype: DTypeLike) -> Array:
    """A setting, or one per row, with a shape that broadcasts to logits [B, V]."""
    return jnp.asarray(number, dtype).reshape(-1, 1)


def _most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _keep_top(
    logits: Float[Array, "B V"], top_k: Int[Array, "#B 1"], top_p: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """top-k, then top-p among the remaining tokens, with one sort; top_p = 1 removes nothing."""
    vocab = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1)  # ascending
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    place = jnp.broadcast_to(vocab - jnp.clip(top_k, 1, vocab), (len(logits), 1))
    kth = jnp.take_along_axis(ranked, place, axis=-1)
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    below = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    rare = ((below <= 1.0 - top_p) & (top_p < 1)).at[:, -1].set(False)
    ranked = jnp.where(rare, -jnp.inf, ranked)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)
