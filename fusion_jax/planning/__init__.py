"""What `python -m fusion_jax.plan` is made of: the typical step, the program compiled for it, and what bounds it."""
