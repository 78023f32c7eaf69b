"""Checkpoints on disk: the parameters' one mapping table, and the formats that hold them."""
