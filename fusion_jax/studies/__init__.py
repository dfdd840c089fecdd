"""Trains, evaluates and compares the variants of a study for `python -m fusion_jax.study`."""
