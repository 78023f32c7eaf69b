"""What long-context models are measured by: perplexity by length, passkey retrieval, plots."""
