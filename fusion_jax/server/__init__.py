"""Serves a checkpoint over HTTP, with a web page: `python -m fusion_jax.serve --checkpoint DIR`."""
