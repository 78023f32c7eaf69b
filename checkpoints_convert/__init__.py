"""Checkpoint conversion: Hugging Face folders <-> Orbax, and the proof that nothing changed.

python -m checkpoints_convert.hf_to_orbax SRC DST
python -m checkpoints_convert.orbax_to_hf SRC DST
python -m checkpoints_convert.verify SRC CONVERTED
"""
