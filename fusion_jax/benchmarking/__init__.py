"""What `python -m fusion_jax.benchmark` measures: training steps, checkpoints, generation and the input pipeline."""
