"""DCA in NumPy float64, written from the paper's text alone and sharing no code with the package.

The logit of a pair depends on its relative position only, so the query is turned by
exp(i * M[i, j] * frequency) towards each key: no rotation of keys, no phases, no merge.
"""

import functools
import math

import numpy as np


def relative_position(i: int, j: int, s: int, largest: int) -> int:
    chunks_back = i // s - j // s
    if chunks_back == 0:
        query = i % s
    elif chunks_back == 1:
        query = min(i % s + s, largest)
    else:
        query = min(2 * s - 1, largest)
    return query - j % s


@functools.cache
def relative_positions(i: int, s: int, largest: int) -> np.ndarray:
    """Of a query and every key up to it."""
    return np.array([relative_position(i, j, s, largest) for j in range(i + 1)])


def attention(
    query: np.ndarray,  # [B, T, N, H]
    key: np.ndarray,  # [B, S, K, H]
    value: np.ndarray,  # [B, S, K, H]
    *,
    s: int,
    largest: int,
    theta: float = 10_000.0,
    offset: list[int] | None = None,
    lengths: list[int] | None = None,
    temperature: float = 1.0,
    allowed: np.ndarray | None = None,  # [B, K, T, S]
) -> np.ndarray:
    """One softmax over all keys j <= i; zeros for queries at or beyond their row's length.

    `allowed` leaves some of these keys out.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_queries, num_heads, head_dim = query.shape
    group = num_heads // key.shape[2]
    half = head_dim // 2
    frequency = theta ** (-2.0 * np.arange(half) / head_dim)
    positions = np.arange(min(2 * s, key.shape[1]))  # no pair is further apart
    turns = np.exp(1j * positions[:, None] * frequency)
    offset = offset or [0] * batch
    lengths = lengths or [start + num_queries for start in offset]
    out = np.zeros_like(query)
    for b in range(batch):
        for t in range(num_queries):
            i = offset[b] + t
            if i >= lengths[b]:
                continue
            turn = turns[relative_positions(i, s, largest)]
            for n in range(num_heads):
                k, v = key[b, : i + 1, n // group], value[b, : i + 1, n // group]
                q = query[b, t, n, :half] + 1j * query[b, t, n, half:]
                logits = (q * turn * (k[:, :half] - 1j * k[:, half:])).real.sum(axis=1)
                logits *= temperature / math.sqrt(head_dim)
                if allowed is not None:
                    logits = np.where(allowed[b, n // group, t, : i + 1], logits, -np.inf)
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v / weights.sum()
    return out
