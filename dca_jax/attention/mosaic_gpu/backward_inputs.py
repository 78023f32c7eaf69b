"""Arguments and results of the backward kernels on Hopper."""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """Arrays a kernel reads, or their references."""

    queries: tuple[Any, ...]  # for each phase [B, T, N, H], rotated, T a multiple of 8
    do: Any  # [B, T, N, H]
    key: Any  # [L * B, S, K, H]
    value: Any
    minus_lse: Any  # [B, N, padded], log2 units
    minus_delta: Any
    low: Any  # [B, phases, padded]: `backward_spans.key_ranges`
    high: Any
    cache_rows: Any  # [B]: index among the L * B rows
    table: Any = None  # what a kernel adds: where it finds the tiles that meet


class Gradients(NamedTuple):
    """Results, or their references."""

    dqs: tuple[Any, ...]  # for each phase float32 [B, padded, N, H], before the logit scale
    dk: Any  # [B, S, K, H]
    dv: Any
