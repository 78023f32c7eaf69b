"""A server with continuous batching over one paged cache."""
