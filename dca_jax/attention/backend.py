"""The interface of attention backends, and the per-row inputs they share."""

from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.bands import Method
from dca_jax.attention.softmax import FAR
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import Device

# The name of output and log-sum-exp for policies of `jax.checkpoint`: if these are saved, the
# backward pass does not run the forward kernel again.
SAVED = "attention"

# Plain causal attention is DCA with a single chunk that never ends.
PLAIN = DCAConfig(chunk_len=FAR, max_query_position=FAR)


class Rows(NamedTuple):
    """Inputs that differ between the rows of a batch; they have no gradient."""

    inv_freq: Float[Array, "#B half"]  # radians per position
    scale: Float[Array, " B"]  # factor on the row's logits
    offset: Int[Array, " B"]  # text index of the row's first query
    lengths: Int[Array, " B"]  # tokens of the row's text, including the queries
    key_offset: Int[Array, " B"]  # text index of the row's first key: not 0 for a slice of a text
    whole: Int[Array, " B"]  # text length for positions: the whole prompt's for a piece

    def of_dca(self) -> dict[str, Array]:
        """Arguments for `dca_jax.dca.dense_attention`; DCA's positions do not depend on length."""
        numbers = self._asdict()
        del numbers["whole"]
        return numbers


class KeyBlocks(NamedTuple):
    """The key blocks that each tile of queries reads, among those that all its queries attend to.

    Tiles and blocks have 128 tokens and start at multiples of 128 in the text;
    `dca_jax.attention.blocks` has a diagram. Tile t of row b contains the queries with text indices
    128 n to 128 n + 127, where n = rows.offset[b] // 128 + t. T queries have `num_tiles(T)` tiles,
    wherever they begin.

    Attributes:
        counts: number of blocks in each phase, in the order of `dca_jax.dca.PHASES`.
        numbers: block numbers, counted from the text's first key: those of inter, then succ, then
            intra, each in ascending order. Entries beyond the counts are not read.
        skip: ln lambda for each row: blocks in the list whose logits are small are skipped
            (`dca_jax.attention.sparse.skip_softmax`). -inf skips none in that row; None skips none
            in any row.
    """

    counts: Int[Array, "B K tiles 3"]
    numbers: Int[Array, "B K tiles most"]
    skip: Float[Array, " B"] | None = None


class Backend(Protocol):
    """The functions of a backend's module. Queries are unrotated, keys rotated by `rotate_keys`.

    Keys and values are a stack of layers [L, B, S, K, H] (a KV cache, or L = 1) with the number of
    the layer to read, so that a kernel reads the layer in place without a copy. They may be a slice
    of the text, with token key_offset + j in slot j, as on each device in context parallelism. Some
    queries may then have no keys in the slice.
    """

    def unsupported(
        self,
        device: Device,
        query: jax.ShapeDtypeStruct,
        key: jax.ShapeDtypeStruct,
        dca: Method,
        *,
        listed: bool = False,
        paged: bool = False,
    ) -> str | None:
        """Why this backend cannot run with these shapes and dtypes on this device; None if it can.

        A method other than DCA is passed in place of a `DCAConfig`; it has no phases, and keys are
        unrotated. `listed` means with lists of key blocks, and `paged` means with pages, where S is
        the number of tokens that a row's page table covers.
        """
        ...

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Num[Array, "L R S K H"],
        value: Num[Array, "L R S K H"],
        layer: Int[Array, ""],
        rows: Rows,
        *,
        dca: DCAConfig,
        phases: tuple[Phase, ...],
        with_lse: bool,
        scales: Scales | None = None,
        blocks: KeyBlocks | None = None,
        pages: Int[Array, "B pages_per_row"] | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
        """Output over the keys of `phases`; on request the logits' natural log-sum-exp, float32.

        A query without keys (padding included) has output 0 and log-sum-exp -inf. With `scales`,
        key and value are in 8 bits; with `blocks`, tiles read only the listed key blocks; with
        `pages`, key and value are pools [L, P, page, K, H]. These have no backward pass. With
        lists or pages, keys start at the text's first token: `rows.key_offset` is 0.
        """
        ...

    def backward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "L B S K H"],
        value: Float[Array, "L B S K H"],
        layer: Int[Array, ""],
        rows: Rows,
        do: Float[Array, "B T N H"],
        lse: Float[Array, "B N T"],
        delta: Float[Array, "B N T"],
        *,
        dca: DCAConfig,
        phases: tuple[Phase, ...],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Gradients with respect to query, the layer's (rotated) key and its value.

        P = exp(logits - lse), dP = dO v^T, dS = P * (dP - delta). `lse` and `delta` may cover more
        keys than these; a query without any of these keys then has gradient 0.
        """
        ...
