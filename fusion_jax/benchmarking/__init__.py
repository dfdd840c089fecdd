"""Measures training steps, checkpoints, generation and input for `python -m fusion_jax.benchmark`."""
