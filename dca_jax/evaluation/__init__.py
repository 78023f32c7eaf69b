"""What long-context models are measured by; `dca-jax eval` and docs/guides/evaluate.md."""
