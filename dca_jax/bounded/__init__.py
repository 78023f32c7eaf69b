"""Runs untrusted programs and reads untrusted files in separate processes with limits."""
