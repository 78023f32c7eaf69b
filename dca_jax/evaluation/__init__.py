"""Evaluation of long-context models; see `dca-jax eval` and docs/guides/evaluate.md."""
