"""Measures training steps, checkpoints, generation, the server and input for `python -m fusion_jax.benchmark`."""
