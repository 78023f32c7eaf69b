"""A text read once, for many prompts."""

import itertools
import threading
from collections.abc import Sequence

import numpy as np

from dca_jax.errors import InputError
from dca_jax.inference.buckets import copied
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama


class Prefix:
    """A text that has been read once, so that many prompts that begin with it need not read it.

    It owns a KV cache. One prompt at a time continues in that cache itself, which is then rolled
    back; several at once continue in copies. Threads may share it: what one of them uses is refused
    to the others.

    Attributes:
        tokens: of the text.
        text: None if the prefix was given as tokens.
    """

    def __init__(self, cache: KVCache, tokens: tuple[int, ...], text: str | None) -> None:
        self.tokens, self.text = tokens, text
        self._lock = threading.Lock()
        self._cache: KVCache | None = cache
        self._held = len(tokens)  # how many of them the cache holds still

    @property
    def usable(self) -> bool:
        """False while a prompt is being continued, and after one was interrupted on the device."""
        cache = self._cache
        return cache is not None and not cache.key.is_deleted()

    @property
    def cache(self) -> KVCache:
        """The cache, to be copied.

        Raises:
            InputError: the prefix is not `usable`.
        """
        cache = self._cache
        if cache is None or cache.key.is_deleted():
            raise InputError(
                "this prefix is in use by another generation, was handed on to `prefill`, or was "
                "lost to an interruption; finish (or close) the other one, or prefill again"
            )
        return cache

    def take(self, model: Llama, length: int) -> KVCache:
        """The cache, enlarged if it holds less than `length`; the caller's until `give_back`.

        Raises:
            InputError: the prefix is not `usable`, or a larger cache does not fit into memory.
        """
        with self._lock:
            cache, self._cache = self.cache, None
        if cache.capacity >= length:
            return cache
        try:
            larger = copied(model, cache, 1, length)
        except BaseException:
            self.give_back(cache, self._held)
            raise
        return larger

    def copies(self, model: Llama, batch: int, length: int) -> KVCache:
        """A cache for `batch` texts of `length` tokens, which begin with what the prefix holds."""
        with self._lock:  # nobody takes the cache while it is copied
            return copied(model, self.cache, batch, length)

    def give_back(self, cache: KVCache, held: int) -> None:
        """Returns a cache that has read the first `held` of the tokens, and others since."""
        if not cache.key.is_deleted():
            self._held = min(self._held, held, int(np.asarray(cache.lengths)[0]))
            cache = cache.rollback([self._held])
        with self._lock:
            self._cache = cache

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read again."""
        pairs = zip(self.tokens[: self._held], tokens, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
