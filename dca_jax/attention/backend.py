"""What every backend of the attention imports: its interface, and each row's numbers."""

from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.bands import Method
from dca_jax.attention.softmax import FAR
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import Device

# The name under which a policy of `jax.checkpoint` finds output and log-sum-exp: with these kept,
# the backward pass need not run the forward kernel again.
SAVED = "attention"

# Plain causal attention is DCA whose first chunk never ends.
PLAIN = DCAConfig(chunk_len=FAR, max_query_position=FAR)


class Rows(NamedTuple):
    """What differs from row to row of a batch; carries no gradient."""

    inv_freq: Float[Array, "#B half"]  # radians per position
    scale: Float[Array, " B"]  # what the row's logits are multiplied by
    offset: Int[Array, " B"]  # index of the row's first query in its text
    lengths: Int[Array, " B"]  # tokens of the row's text, the queries' own included
    key_offset: Int[Array, " B"]  # index of the row's first key: not 0 for a slice of a text
    whole: Int[Array, " B"]  # tokens that positions count on: of a piece of a prompt, the prompt's

    def of_dca(self) -> dict[str, Array]:
        """What `dca_jax.dca.dense_attention` takes: DCA's positions do not count on a length."""
        numbers = self._asdict()
        del numbers["whole"]
        return numbers


class KeyBlocks(NamedTuple):
    """The key blocks that each tile of queries reads, of those that all its queries meet in full.

    Tiles and blocks have 128 tokens, and stand at multiples of 128 of the text's index; a picture
    is in `dca_jax.attention.blocks`.
    Tile t of row b is that of the queries with text indices 128 n to 128 n + 127 where
    n = rows.offset[b] // 128 + t. T queries have `num_tiles(T)`, wherever they begin.

    Attributes:
        counts: how many blocks of each phase, in the order of `dca_jax.dca.PHASES`.
        numbers: of the blocks, counted from the text's first key: those of inter, then those of
            succ, then those of intra, each in ascending order. What lies beyond is not read.
        skip: of each row, ln lambda: of the blocks that are read, those whose logits are small are
            passed by (`dca_jax.attention.sparse.skip_softmax`); -inf: none. None: in no row.
    """

    counts: Int[Array, "B K tiles 3"]
    numbers: Int[Array, "B K tiles most"]
    skip: Float[Array, " B"] | None = None


class Backend(Protocol):
    """What a backend's module offers. Queries are raw, keys rotated by `rotate_keys`.

    Keys and values come as a stack of layers [L, B, S, K, H] (a KV cache, or L = 1) with the number
    of the one to read, so that a kernel reads a layer in place and nothing copies it out. They may
    be a slice of the text, slot j being its token key_offset + j, as a device holds under context
    parallelism; then a query may meet no key here at all.
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
        """Why this backend cannot run on these shapes and dtypes on this device; None: it can.

        What runs with another method than DCA is given it in place of a `DCAConfig`, without phases
        and with raw keys.
        `listed` and `paged`: with lists of key blocks, and through pages, S being the tokens of a
        row's page table.
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

        A query that meets no key (padding too) has output 0 and log-sum-exp -inf. With `scales`,
        key and value are in 8 bits; with `blocks`, tiles read the key blocks of lists; with
        `pages`, key and value are pools [L, P, page, K, H]. There is no backward of these. Keys
        in lists and pages are a row's from its text's first: `rows.key_offset` is 0.
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
        """Gradients of query, of the layer's key (rotated) and of its value.

        P = exp(logits - lse), dP = dO v^T, dS = P * (dP - delta). `lse` and `delta` may be of
        more keys than these: a query that meets none of them then has gradient 0.
        """
        ...
