"""Finetuning on long dialogues: reading and rendering them, the rows that a step trains on."""
