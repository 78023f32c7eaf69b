"""A text read once, for many prompts."""

import threading
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from dca_jax.attention.bands import PositionMethod
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.buckets import copied
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama


class Prefix:
    """A text that has been read once, so that many prompts that begin with it need not read it.

    It owns a KV cache. One prompt at a time continues in that cache itself, which is then rolled
    back; several at once continue in copies. Threads may share it: what would take a cache that is
    in use is refused.

    What a long prompt's end reads densely, and a longer one's would not, is read again.

    Attributes:
        model: that has read it, and alone can go on from it.
        tokens: of the text.
        text: None if the prefix was given as tokens.
        room: tokens that a larger cache, when one is needed, has beyond the need.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        tokens: tuple[int, ...],
        text: str | None,
        room: int = 0,
    ) -> None:
        self.model, self.tokens, self.text, self.room = model, tokens, text, room
        self._cache: KVCache | None = cache
        self._read, self._held = tokens, len(tokens)  # what the cache holds; of the text
        # Tokens of the prompts as which the text, and what the cache holds, have been read.
        self._prompt = self._read_prompt = len(tokens)
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        """False while a prompt is being continued, and after one was interrupted on the device."""
        cache = self._cache
        return cache is not None and not cache.key.is_deleted()

    def take(self, model: Llama, shared: int, length: int) -> KVCache:
        """The cache of the first `shared` tokens; the caller's until `give_back`.

        Args:
            length: tokens there must be room for. A cache with less is copied into one that has
                `room` beyond them.

        Raises:
            InputError: another model than the prefix's; it is not `usable`, or a larger cache does
                not fit into memory.
        """
        self._check_model(model)
        with self._lock:
            cache = self._usable_cache()
            if cache.capacity < length:
                cache = copied(model, cache, 1, length + self.room)
            self._cache = None
        return cache.rollback([shared])

    def copies(self, model: Llama, shared: Sequence[int], length: int) -> KVCache:
        """A cache for texts of `length` tokens, a row for each number of first tokens in `shared`.

        Raises:
            InputError: another model than the prefix's; it is not `usable`, or the copies do not
                fit into memory.
        """
        self._check_model(model)
        with self._lock:
            cache = copied(model, self._usable_cache(), len(shared), length)
        return cache.rollback(shared)

    def give_back(self, cache: KVCache, read: Sequence[int], prompt: int) -> None:
        """Returns the cache, which has read the beginning of `read`, if not all of it.

        Args:
            prompt: how many tokens of it were a prompt, and not drawn.
        """
        if not cache.key.is_deleted():
            held = min(int(np.asarray(cache.lengths)[0]), len(read))
            self._read, cache = tuple(read[:held]), cache.rollback([held])
            self._read_prompt = prompt
            self._held = self._alike(common_beginning(self.tokens, self._read), prompt)
        self._cache = cache

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read again.

        Only tokens of the prefix itself count, so that a prompt's result does not depend on the
        prompts before it.
        """
        return self._alike(common_beginning(tokens, self.tokens[: self._held]), len(tokens))

    def keep(self) -> None:
        """Makes all that has been read the text of this prefix: a prompt and its answer, too."""
        self.tokens, self.text, self._held = self._read, None, len(self._read)
        self._prompt = self._read_prompt

    def _alike(self, common: int, prompt: int) -> int:
        """How much of what a prompt of so many tokens has in common with the text is read alike."""
        if self.model.sparse is None:
            return common
        return self.model.sparse.shared(common, self._prompt, prompt)

    def _check_model(self, model: Llama) -> None:
        if not _reads_alike(model, self.model):
            raise InputError(
                "this prefix was read by another model, or by another method; prefill the text "
                "with this one"
            )

    def _usable_cache(self) -> KVCache:
        if self._cache is None or not self.usable:
            raise InputError(
                "this prefix is in use by another generation, was handed on to `prefill`, or was "
                "lost to an interruption; finish (or close) the other one, or prefill again"
            )
        return self._cache


def _reads_alike(a: Llama, b: Llama) -> bool:
    """Whether two models are the same arrays, and read in the same way."""
    settings = ("config", "dca", "sparse", "dtype")
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return (
        all(getattr(a, name) == getattr(b, name) for name in settings)
        and len(ours) == len(theirs)
        and all(x is y for x, y in zip(ours, theirs, strict=True))
    )


def depends_on_length(model: Llama) -> bool:
    """Whether what is read of a text depends on how long the whole is.

    So it is with dynamic NTK, a temperature, and positions that are made for a length, where a
    prefix is a text of its own.
    """
    if isinstance(model.dca, PositionMethod) and model.dca.by_length:
        return True
    slope = model.dca.temperature_slope if isinstance(model.dca, DCAConfig) else 0.0
    return slope != 0 or model.config.rope.rope_type == "dynamic"


Ids = Sequence[int] | Int[np.ndarray, " _"]


def common_beginning(a: Ids, b: Ids) -> int:
    """How many tokens two texts have in common before they differ."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length
