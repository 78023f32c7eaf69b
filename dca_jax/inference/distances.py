"""Relative positions that are a step function of the distance, f(i - j), as in some papers.

Such a position is not of the form P_q(i) - P_k(j). But if f has steps of equal width, floor(p (i -
j) / q), it is one of two such differences:

    p i / q = A + a / q,  p j / q = C + c / q  with integers A, C and 0 <= a, c < q:
    floor(p (i - j) / q) = A - C where c <= a, and A - C - 1 where c > a

So in such a band a query has one position relative to some keys, and one less relative to the
others: `dca_jax.attention.bands.Steps`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dca_jax.attention.bands import Band, Number, Steps

DIGIT = 9  # bits that `scaled` processes at once
LONGEST = 2**21  # tokens up to which `scaled` does not overflow int32

Row = Int[Array, "B 1"] | Number


def stepped_band(
    index: Int[Array, "B T"],
    start: Row,
    stop: Row,
    base: Row,
    *,
    p: Row = 1,
    q: Row = 1,
) -> Band:
    """Keys at the distances d in [start, stop), at the positions base + floor(p (d - start) / q).

    Args:
        index: text indices of the queries.
        start, stop, base: one for all rows, or one per row.
        p, q: 0 <= p <= q, and p is 1 or q below `LONGEST`.
    """
    whole, rest = scaled(index - start, p, q)
    origin = whole[:, :1]  # nearby, so that float32 angles stay accurate in long texts
    first = jnp.maximum(index - (stop - 1), 0)
    return Band(
        first,
        index - (start - 1),
        jnp.asarray(base + whole - origin),
        lambda j: scaled(j, p, q)[0] - origin,
        Steps(rest, lambda j: scaled(j, p, q)[1]),
    )


def scaled(x: Int[Array, "*shape"], p: Row, q: Row) -> tuple[Array, Array]:
    """The floor of p x / q, and p x modulo q; int32 throughout.

    p is multiplied by a few bits of x at a time and reduced modulo q each time. With p <= q < 2^21
    and nine bits, nothing reaches 2^31.
    """
    quotient, rest = jnp.divmod(x, q)
    if isinstance(p, int) and p == 1:
        return quotient, rest
    whole, remainder = jnp.zeros_like(rest), jnp.zeros_like(rest)
    for shift in range(2 * DIGIT, -1, -DIGIT):
        digit = (rest >> shift) & (2**DIGIT - 1)
        more, remainder = jnp.divmod((remainder << DIGIT) + p * digit, q)
        whole = (whole << DIGIT) + more
    return jnp.asarray(p * quotient + whole), remainder
