"""Checkpoints on disk: the mapping table of parameters, and the file formats."""
