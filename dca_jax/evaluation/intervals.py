"""95 % confidence intervals for scores that are means of samples from 0 to 1.

Wilson's score interval (1927), which is also informative when every sample is right. Partly right
samples vary less than right or wrong ones with the same mean, so for such scores the interval tends
to be too wide rather than too narrow. The interval of a mean over several tasks combines theirs as
in Zou and Donner (2008, "MOVER").
"""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(mean: float, samples: int) -> tuple[float, float]:
    """The interval of a score, from 0 to 1, of which `samples` samples have this mean."""
    center = (mean + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    variance = mean * (1 - mean) / samples + Z**2 / (4 * samples**2)
    half = Z * math.sqrt(max(variance, 0.0)) / (1 + Z**2 / samples)
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(cells: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The interval of the mean of several scores, each with its own samples.

    Args:
        cells: mean and number of samples of each score.
    """
    mean = math.fsum(mean for mean, _ in cells) / len(cells)
    ends = [(mean, *wilson(mean, samples)) for mean, samples in cells]
    below = math.sqrt(math.fsum((mean - low) ** 2 for mean, low, _ in ends)) / len(cells)
    above = math.sqrt(math.fsum((high - mean) ** 2 for mean, _, high in ends)) / len(cells)
    return max(0.0, mean - below), min(1.0, mean + above)


def in_per_cent(cell: tuple[float, int]) -> str:
    """A mean with its interval and number of samples, formatted for a table."""
    mean, samples = cell
    low, high = wilson(mean, samples)
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f}; {samples})"
