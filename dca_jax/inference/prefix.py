"""A prefix that is read once for many prompts."""

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
    """A text that has been read once and need not be read again by prompts that begin with it.

    It owns a KV cache. A single prompt continues in that cache, which is then rolled back; several
    prompts at once continue in copies. Threads may share it: using the cache while it is in use is
    refused.

    With sparse prefill, the end of a prompt is read densely; that part is read again for a longer
    prompt, which would read it sparsely.

    Attributes:
        model: the model that has read the text; only it can continue.
        tokens: the token ids of the text.
        text: the text; None if the prefix was given as tokens.
        room: spare tokens of a larger cache, if one is needed.
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
        self._read, self._held = tokens, len(tokens)  # tokens in the cache, and tokens of the text
        # Lengths of the prompts with which the text and the tokens in the cache have been read.
        self._prompt = self._read_prompt = len(tokens)
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        """False while a prompt is being continued, and after an interruption on the device."""
        cache = self._cache
        return cache is not None and not cache.key.is_deleted()

    def take(self, model: Llama, shared: int, length: int) -> KVCache:
        """The cache with the first `shared` tokens, for the caller's use until `give_back`.

        Args:
            length: required capacity in tokens. A smaller cache is copied into one with `room`
                tokens more than that.

        Raises:
            InputError: not the prefix's model, the prefix is not `usable`, or a larger cache does
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
        """A cache for texts of `length` tokens; row b has the first `shared[b]` tokens.

        Raises:
            InputError: not the prefix's model, the prefix is not `usable`, or the copies do not fit
                into memory.
        """
        self._check_model(model)
        with self._lock:
            cache = copied(model, self._usable_cache(), len(shared), length)
        return cache.rollback(shared)

    def give_back(self, cache: KVCache, read: Sequence[int], prompt: int) -> None:
        """Returns the cache, which contains the tokens `read` or their beginning.

        Args:
            prompt: number of prompt tokens among them; the others were generated.
        """
        if not cache.key.is_deleted():
            held = min(int(np.asarray(cache.lengths)[0]), len(read))
            self._read, cache = tuple(read[:held]), cache.rollback([held])
            self._read_prompt = prompt
            self._held = self._alike(common_beginning(self.tokens, self._read), prompt)
        self._cache = cache

    def shared(self, tokens: Sequence[int]) -> int:
        """Number of tokens of a prompt that need not be read again.

        Only tokens of the prefix itself count, so that a prompt's result does not depend on earlier
        prompts.
        """
        return self._alike(common_beginning(tokens, self.tokens[: self._held]), len(tokens))

    def keep(self) -> None:
        """Extends the prefix to all tokens read, including a prompt and its answer."""
        self.tokens, self.text, self._held = self._read, None, len(self._read)
        self._prompt = self._read_prompt

    def _alike(self, common: int, prompt: int) -> int:
        """How many of the tokens in common are read in the same way for a prompt of this length."""
        if self.model.sparse is None:
            return common
        return self.model.sparse.shared(common, self._prompt, prompt)

    def _check_model(self, model: Llama) -> None:
        if not _reads_alike(model, self.model):
            raise InputError(
                "this prefix was read with another model or method; prefill the text with this one"
            )

    def _usable_cache(self) -> KVCache:
        if self._cache is None or not self.usable:
            raise InputError(
                "this prefix is in use by another generation, was reused by `prefill`, or was lost "
                "in an interruption; finish (or close) the other generation, or prefill again"
            )
        return self._cache


def _reads_alike(a: Llama, b: Llama) -> bool:
    """Whether two models share their arrays and read in the same way."""
    settings = ("config", "dca", "sparse", "dtype")
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return (
        all(getattr(a, name) == getattr(b, name) for name in settings)
        and len(ours) == len(theirs)
        and all(x is y for x, y in zip(ours, theirs, strict=True))
    )


def depends_on_length(model: Llama) -> bool:
    """Whether the hidden states of a text depend on its whole length.

    This is the case with dynamic NTK, a temperature, and positions for a given length. A prefix is
    then read with its own length.
    """
    if isinstance(model.dca, PositionMethod) and model.dca.by_length:
        return True
    slope = model.dca.temperature_slope if isinstance(model.dca, DCAConfig) else 0.0
    return slope != 0 or model.config.rope.rope_type == "dynamic"


Ids = Sequence[int] | Int[np.ndarray, " _"]


def common_beginning(a: Ids, b: Ids) -> int:
    """Length of the common beginning of two texts, in tokens."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length
