"""Metrics of a server in Prometheus' format."""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds, from a token of a small model to a prompt of a million tokens.
TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named = {"namespace": "dca_jax", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **named)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **named)
        self.cached_tokens = Counter(
            "cached_prompt_tokens", "Tokens of prompts that did not have to be read", **named
        )
        self.drawn_tokens = Counter("generated_tokens", "Tokens drawn", **named)
        self.cancelled = Counter("cancelled_texts", "Texts whose client went away", **named)
        self.failed = Counter("failed_texts", "Texts that ended in an error", **named)
        self.first = Histogram(
            "time_to_first_token_seconds",
            "From a request to a text's first token",
            **named,
            buckets=TIMES,
        )
        self.between = Histogram(
            "time_between_tokens_seconds",
            "From a token of a text to the next",
            **named,
            buckets=TIMES,
        )
        self.whole = Histogram(
            "request_seconds", "From a request to the end of its last text", **named, buckets=TIMES
        )
        gauges = {
            "running": "Texts that are read or drawn",
            "waiting": "Texts that wait for their turn",
            "pages_used": "Pages of the cache that texts hold",
            "pages_kept": "Pages kept for texts with the same beginning",
            "pages_free": "Empty pages",
        }
        self._gauges = {name: Gauge(name, text, **named) for name, text in gauges.items()}

    def written(self, counts: Mapping[str, int]) -> bytes:
        """All metrics, with the engine's current counts."""
        for name, gauge in self._gauges.items():
            gauge.set(counts[name])
        return generate_latest(self.registry)


class Watch:
    """The times of one request's texts."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began = metrics, time.perf_counter()
        self._last: dict[int, float] = {}

    def token(self, index: int) -> None:
        """One more token of a text."""
        now, last = time.perf_counter(), self._last.get(index)
        if last is None:
            self._metrics.first.observe(now - self._began)
        else:
            self._metrics.between.observe(now - last)
        self._last[index] = now
        self._metrics.drawn_tokens.inc()

    def end(self) -> None:
        """The request has been answered."""
        self._metrics.whole.observe(time.perf_counter() - self._began)
