"""The decoder: Llama 2 and 3, CodeLlama, Vicuna, Mistral, Qwen2 and 3, and mixtures of experts.

Shapes: B batch, T query, S key, N query heads, K kv heads, H head_dim, D model, F ffw, V vocab,
L layers. The layers are stacked on a leading axis and run by one `lax.scan`, or, where some have an
MLP and some a mixture of experts, by one for each run of layers that are alike.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import SAVED, Rows
from dca_jax.attention.bands import PositionMethod
from dca_jax.attention.layer import (
    SparseText,
    attend_to_cache,
    attend_to_text,
    attend_to_texts,
)
from dca_jax.attention.op import make_rows
from dca_jax.attention.parallel.zigzag import pad_to_zigzag, unpad_from_zigzag
from dca_jax.attention.sparse import Sparse
from dca_jax.attention.stored import Stored
from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.experts import Balance, balance_of, load_balancing_loss
from dca_jax.kv_cache import KVCache, PagedCache
from dca_jax.layers import PRODUCT, Block, Layers, Linear, RMSNorm, Run
from dca_jax.products.packed import Packed, is_packed
from dca_jax.products.packed_product import packed_product, unpacked_inner
from dca_jax.rope import Frequencies, RopeConfig
from dca_jax.sharding import Shards

# What is saved per layer for the backward pass, by name; the rest is recomputed.
REMAT: dict[str, Callable[..., Any]] = {
    "layer": jax.checkpoint_policies.nothing_saveable,  # only its input
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),  # and the attention output
    "products": jax.checkpoint_policies.save_only_these_names(SAVED, PRODUCT),  # and projections
}


class Embed(nnx.Module):
    """The token embedding table, [V, D]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Llama(nnx.Module):
    """A Llama-family decoder whose attention is DCA (or plain, with `dca=None`).

    The model is a pytree and can be passed to `jax.jit`, `jax.grad` and `jax.tree.map` directly.
    Any of its matrices may be packed (`dca_jax.products.packed`); `from_params` accepts packed
    matrices.

    Args:
        config: the model's shape.
        dca: setting of Dual Chunk Attention, or another position method
            (`dca_jax.inference.baselines`). None is the model's own plain causal attention.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and matrix products.
        remat: what training saves per layer for the backward pass, a key of `REMAT`; None saves
            everything.
        implementation: attention implementation (`dca_jax.attention.IMPLEMENTATIONS`); None picks
            the best.
        sparse: setting of sparse prefill (`dca_jax.attention.sparse`); None reads densely.
        lora: adapters of the layers' projections (`dca_jax.finetune.lora`), float32.
        rngs: random generators for the initialization (normal, standard deviation 0.02).
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dca: DCAConfig | PositionMethod | None = None,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.bfloat16,
        remat: str | None = None,
        implementation: str | None = None,
        sparse: Sparse | None = None,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        param_dtype = jnp.dtype(param_dtype)
        self.config, self.dca, self.sparse = config, dca, sparse
        self.rope: RopeConfig | Frequencies = config.rope
        self.dtype, self.remat, self.implementation = jnp.dtype(dtype), remat, implementation
        self.embed_tokens = Embed(config, dtype=param_dtype, rngs=rngs)
        self.lora = lora
        self.layers = Layers(config, lora=lora, dtype=param_dtype, rngs=rngs)
        self.norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype=param_dtype)
        D, V, tied = config.hidden_size, config.vocab_size, config.tie_word_embeddings
        self.lm_head = None if tied else Linear((), (D,), (V,), dtype=param_dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of whole texts, float32; those at token t of a row predict token t + 1.

        Args:
            tokens: token ids below V, right-padded; every row starts at index 0.
            lengths: number of real tokens in each row (default: T). Logits at padding are
                meaningless.
        """
        hidden, _ = self.hidden_states(tokens, lengths=lengths)
        return self.unembed(hidden)

    def balanced_hidden_states(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        text_index: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Normalized hidden states of whole texts, and the load-balancing loss of the experts.

        The loss is `dca_jax.experts.load_balancing_loss` over all real tokens and layers, float32;
        0 for a model without experts.
        """
        self.check_window(tokens.shape[1])
        if self.sparse is not None:
            raise InputError(
                f"this model has sparse prefill ({self.sparse.selector.name}), which has no "
                "gradient; for training, load it with sparse='off'"
            )
        rows, _ = self._place_rows(tokens, lengths, None, None)
        x, _, balance = self._read_text(tokens, rows, text_index, None, None)
        return x, jnp.float32(0) if balance is None else load_balancing_loss(balance)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        text_index: Int[Array, "B T"] | None = None,
        cache: KVCache | PagedCache | None = None,
        context_lengths: Int[Array, " B"] | None = None,
        new_cache: DTypeLike | None = None,
        cache_layers: Int[Array, " L"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Normalized hidden states of `tokens`, and the cache with their keys and values appended.

        On a mesh, `context` splits whole texts, and also their hidden states if its size divides T.
        Tokens after a cache are few, so every device has all of them.

        Sparse prefill applies to whole texts longer than its threshold and to pieces of prompts,
        whose `context_lengths` then decide. A piece must begin at a multiple of `sparse.segment`,
        and T must be a multiple of it.

        Args:
            tokens: new tokens of each row, right-padded; without a cache, whole texts.
            lengths: number of real tokens in each row (default: T). Padding is not written to the
                cache.
            text_index: for rows that contain several texts which do not attend to each other, the
                index of each token in its own text, -1 for padding (`dca_jax.attention.packed`).
                Only without a cache.
            cache: the text read so far; `tokens` follow it at cache.lengths[b]. Tokens beyond the
                capacity would be lost, so check it before calling (`dca_jax.inference.generate`
                does).
            context_lengths: length of each row's whole prompt, for temperature, dynamic NTK and
                sparse prefill (default: the row's length after this call).
            new_cache: for whole texts, the dtype of a new cache with their keys and values and a
                capacity of T. This is how a cache split along `context` is filled.
            cache_layers: index of each layer on the first axis of the cache (default: the layer's
                number), for a cache that stores the rows of a batch as layers.

        Raises:
            InputError: plain attention over whole texts longer than the model's sliding window
                (with a cache the length is not known before running; use `check_window`), a batch
                or a capacity of a new cache that is not divisible over the mesh, or a piece for
                sparse prefill whose length is not a multiple of `sparse.segment`.
        """
        if cache is None:
            self.check_window(tokens.shape[1])
        rows, frequency_lengths = self._place_rows(tokens, lengths, cache, context_lengths)
        prompts = rows.lengths if context_lengths is None else context_lengths
        if cache is None:
            prompts = prompts if self.reading(tokens.shape[1]).sparse else None
            x, kept, _ = self._read_text(tokens, rows, text_index, new_cache, prompts)
        else:
            if self.sparse is None or context_lengths is None:  # decoding
                prompts = None
            else:
                self.sparse.check_piece(tokens.shape[1])
            x, kept = self._read_after_cache(tokens, rows, cache, cache_layers, prompts)
        if kept is None:
            return x, None
        held = kept._asdict() | {"lengths": rows.lengths, "frequency_lengths": frequency_lengths}
        return x, KVCache(**held) if cache is None else replace(cache, **held)

    def _place_rows(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"] | None,
        cache: KVCache | PagedCache | None,
        context_lengths: Int[Array, " B"] | None,
    ) -> tuple[Rows, Int[Array, " B"]]:
        """The per-row inputs of the attention, and the lengths for the rotary frequencies."""
        batch, num_new = tokens.shape
        shards = Shards.of(self.norm.scale[...])
        if batch % shards.size("data", "fsdp"):
            raise InputError(
                f"a batch of {batch} rows does not divide over the mesh's "
                f"{shards.size('data', 'fsdp')} devices of data and fsdp; add rows of one token"
            )
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.lengths
        new = jnp.full((batch,), num_new, jnp.int32) if lengths is None else lengths
        after = shards.put(start + new.astype(jnp.int32), None)
        if context_lengths is None:
            context_lengths = after
        frequency_lengths = shards.put(context_lengths, None)
        if cache is not None:
            frequency_lengths = jnp.where(start == 0, context_lengths, cache.frequency_lengths)
        rows = make_rows(
            (batch, num_new, self.config.num_attention_heads, self.config.head_dim),
            dca=self.dca,
            rope=self.rope,
            lengths=after,
            query_offset=start,
            context_lengths=context_lengths,
            frequency_lengths=frequency_lengths,
        )
        return rows, frequency_lengths

    def _read_text(
        self,
        tokens: Int[Array, "B T"],
        rows: Rows,
        text_index: Int[Array, "B T"] | None,
        new_cache: DTypeLike | None,
        prompts: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], Stored | None, Balance | None]:
        """Reads whole texts; returns hidden states, cache (with `new_cache`) and expert balance.

        `prompts`, the prompts' lengths, enables sparse prefill.
        """
        num_new, shards = tokens.shape[1], Shards.of(self.norm.scale[...])
        context = shards.size("context")
        if context > 1 and new_cache is not None and num_new % (2 * context):
            raise InputError(
                f"a cache split over {context} devices needs a capacity that is a multiple of "
                f"{2 * context}, got {num_new} tokens; pad the tokens"
            )
        real = jnp.arange(num_new, dtype=jnp.int32)[None, :] < rows.lengths[:, None]
        if context > 1:
            tokens = pad_to_zigzag(tokens, context)
            real = pad_to_zigzag(real.astype(jnp.int32), context) > 0

        def run_layer(
            x: Array, xs: tuple[Block, Array]
        ) -> tuple[Array, tuple[Stored | None, Balance | None]]:
            block, number = xs
            kept: Stored | None = None

            def attend(query: Array, key: Array, value: Array) -> Array:
                nonlocal kept
                options = {
                    "dca": self.dca,
                    "implementation": self.implementation,
                    "shards": shards,
                }
                if text_index is not None:
                    rope = self.config.rope
                    return attend_to_texts(query, key, value, text_index, rope=rope, **options)
                options["sparse"] = self._sparse_text(prompts, number)
                out, kept = attend_to_text(
                    *(query, key, value), rows=rows, cache_dtype=new_cache, **options
                )
                return out

            x, routing = block(x, attend)
            return x, (kept, None if routing is None else balance_of(routing, real))

        if self.remat is not None:
            run_layer = jax.checkpoint(run_layer, policy=REMAT[self.remat])
        x, of_layers = self._embed(tokens, shards.out("BTD")), []
        for run in self.layers.runs():
            x, of_run = jax.lax.scan(run_layer, x, (run.block, run.numbers))
            of_layers.append(of_run)
        kept, balance = (
            _joined([part for part in parts if part is not None])
            for parts in zip(*of_layers, strict=True)
        )
        x = self.norm(x)
        return (x if context == 1 else unpad_from_zigzag(x, num_new, shards)), kept, balance

    def _read_after_cache(
        self,
        tokens: Int[Array, "B T"],
        rows: Rows,
        cache: KVCache | PagedCache,
        numbers: Int[Array, " L"] | None,
        prompts: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], Stored]:
        """Reads tokens after a cache; returns hidden states and the updated keys and values.

        `prompts`, the prompts' lengths, marks pieces of prompts for sparse prefill.
        """
        shards = Shards.of(self.norm.scale[...])
        paged: dict[str, Any] = {}
        if isinstance(cache, PagedCache):
            paged = {"pages": cache.pages, "common": cache.common}

        def run_layer(
            run: Run, carry: tuple[Array, Array, Stored], block: Block
        ) -> tuple[tuple[Array, Array, Stored], None]:
            number, x, stored = carry
            block = run.with_stacks(block, x)
            in_cache = number if numbers is None else numbers[number]

            def attend(query: Array, key: Array, value: Array) -> Array:
                nonlocal stored
                out, stored = attend_to_cache(
                    *(query, key, value, stored, in_cache),
                    dca=self.dca,
                    rows=rows,
                    implementation=self.implementation,
                    shards=shards,
                    sparse=self._sparse_text(prompts, number),
                    **paged,
                )
                return out

            x, _ = block(x, attend, run.place(number))
            return (number + 1, x, stored), None

        # The cache is the carry of the scan, not scanned over: as xs and ys it would be in memory
        # twice. A layer's number is one too: XLA then has it from the loop's own counter.
        x = self._embed(tokens, shards.out("BTD", whole="T"))
        carry = jnp.int32(0), x, cache.stored
        for run in self.layers.runs():
            # Experts, packed kernels and kernels of few rows must not be copied either.
            xs, length = run.sliced(carry[1]), run.stop - run.start
            carry, _ = jax.lax.scan(partial(run_layer, run), carry, xs, length)
        _, x, stored = carry
        return self.norm(x), stored

    def _sparse_text(
        self, prompts: Int[Array, " B"] | None, layer: Int[Array, ""]
    ) -> SparseText | None:
        if self.sparse is None or prompts is None:
            return None
        return SparseText(self.sparse, prompts, layer)

    def _embed(self, tokens: Int[Array, "B T"], place: Any) -> Float[Array, "B T D"]:
        table = self.embed_tokens.embedding[...]
        shards = Shards.of(table)
        table = shards.gathered(table)
        if shards.size("tensor") == 1 and not isinstance(table, Packed):
            return table.at[tokens].get(out_sharding=place).astype(self.dtype)
        cut = shards.size("tensor") > 1

        # Otherwise XLA's GPU compiler would gather the table for every generated token.
        def look_up(own: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            row = tokens - jax.lax.axis_index("tensor") * len(own) if cut else tokens
            here = (row >= 0) & (row < len(own))
            row = jnp.where(here, row, 0)
            found = own.rows(row, self.dtype) if isinstance(own, Packed) else own[row]
            found = jnp.where(here[..., None], found, 0).astype(self.dtype)
            return jax.lax.psum(found, "tensor") if cut else found

        if shards.mesh is None:
            return look_up(table, tokens)
        batch, length, _ = place.spec
        where = shards.specs(table), PartitionSpec(batch, length)
        return shards.local(look_up, where, place.spec)(table, tokens)

    def unembedding(self) -> Float[Array, "D V"]:
        """The kernel of `unembed` as stored or unpacked, gathered along `fsdp`."""
        kernel, letters = self._unembedding()
        shards = Shards.of(kernel)
        kernel = shards.gathered(kernel)
        if isinstance(kernel, Packed):  # a packed matrix has outputs before inputs
            return unpacked_inner(kernel, self.dtype).T
        return kernel if letters == "DV" else kernel.T

    def _unembedding(self) -> tuple[Any, str]:
        """The kernel of `unembed`, and its axis letters."""
        if self.lm_head is None:
            return self.embed_tokens.embedding[...], "VD"
        return self.lm_head.kernel[...], "DV"

    def unembed(
        self, hidden: Float[Array, "*batch D"], kernel: Float[Array, "D V"] | None = None
    ) -> Float[Array, "*batch V"]:
        """Logits, float32, from normalized hidden states.

        `kernel` is the result of `unembedding()`, if the caller gathers it once for many calls.
        """
        stored, letters = self._unembedding()
        if kernel is None and isinstance(stored, Packed) and hidden.ndim == 2:
            subscripts = f"BD,{letters}->BV"
            return packed_product(subscripts, hidden, stored).astype(jnp.float32)
        if kernel is None and not isinstance(stored, Packed):
            # In its stored layout: XLA's CPU compiler makes a slow loop of a transposed table.
            return self._logits(hidden, Shards.of(stored).gathered(stored), letters)
        return self._logits(hidden, self.unembedding() if kernel is None else kernel, "DV")

    def _logits(
        self, hidden: Float[Array, "*batch D"], kernel: Float[Array, "_ _"], letters: str
    ) -> Float[Array, "*batch V"]:
        """The product of `unembed`; `letters` are those of the kernel's axes."""
        shards = Shards.of(kernel)
        one_row = hidden.ndim == 2 and len(hidden) == shards.size("data", "fsdp")
        if one_row and hidden.dtype != jnp.float32:
            # XLA's GPU compiler multiplies by a vector in the result's dtype, so it would write out
            # the kernel in float32 for every generated token. Two rows make a matrix product.
            twice = jnp.broadcast_to(hidden[:, None], (len(hidden), 2, hidden.shape[1]))
            return self._logits(twice, kernel, letters)[:, 0]
        kernel = kernel.astype(hidden.dtype)
        rows = "BTU"[: hidden.ndim - 1]
        subscripts = f"{rows}D,{letters}->{rows}V"
        return jnp.einsum(
            subscripts,
            hidden,
            kernel,
            precision="highest" if hidden.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
            out_sharding=shards.product(subscripts, hidden, kernel),
        )

    def nll(
        self,
        hidden: Float[Array, "*batch D"],
        targets: Int[Array, "*batch"],
        kernel: Float[Array, "D V"] | None = None,
    ) -> Float[Array, "*batch"]:
        """-ln p(target) of each token, in nats, float32; the logits may be split along V."""
        logits = self.unembed(hidden, kernel)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        is_target = ids == targets[..., None].astype(jnp.int32)
        target = jnp.where(is_target, logits, 0).sum(axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - target

    def params(self) -> dict[str, Any]:
        """The parameters as a nested dict with stable names, with stacked layers.

        Values are arrays or, for packed matrices, `dca_jax.products.packed.Packed`.
        """
        tree: dict[str, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self, is_leaf=is_packed):
            *parents, name = _names(path)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return tree

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any], **options: Any) -> "Llama":
        """A model with existing arrays or packed matrices (no copy); `options` as in `Llama`.

        Raises:
            InputError: a missing or extra name, or a wrong shape.
        """
        abstract = jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))
        expected, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        given = {
            tuple(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params), is_leaf=is_packed)
        }
        leaves = []
        for path, leaf in expected:
            name = _names(path)
            if name not in given:
                raise InputError(f"parameter {'.'.join(name)} is missing")
            found = given.pop(name)
            if tuple(found.shape) != tuple(leaf.shape):
                raise InputError(
                    f"parameter {'.'.join(name)} has shape {tuple(found.shape)}, expected "
                    f"{tuple(leaf.shape)} from the config"
                )
            leaves.append(found)
        if given:
            extra = ", ".join(".".join(name) for name in sorted(given))
            raise InputError(f"unexpected parameters: {extra}")
        return jax.tree_util.tree_unflatten(treedef, leaves)

    def reading(self, length: int) -> "Llama":
        """The same model for texts of up to `length` tokens: dense up to the sparse threshold."""
        if self.sparse is None or length > self.sparse.threshold:
            return self
        dense = copy.copy(self)
        dense.sparse = None
        return dense

    def check_window(self, length: int) -> None:
        """Raises InputError if plain attention over `length` tokens exceeds the sliding window."""
        window = self.config.sliding_window
        if self.dca is None and window is not None and length > window:
            raise InputError(
                f"this model's plain attention has a sliding window of {window} tokens, which is "
                f"less than the {length} requested; use DCA (dca=...) for longer texts"
            )


def _joined(parts: list[Any]) -> Any:
    """The results of runs of layers, concatenated over all layers; None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """('layers', 'mlp', 'up_proj', 'kernel') from a leaf's path, which ends in Param.value."""
    return tuple(key.name for key in path[:-1])
