"""Checkpoint conversion between Hugging Face folders and Orbax, and verification of the result.

python -m checkpoints_convert.hf_to_orbax SRC DST
python -m checkpoints_convert.orbax_to_hf SRC DST
python -m checkpoints_convert.verify SRC CONVERTED
"""
