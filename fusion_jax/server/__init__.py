"""An HTTP server and a web page for a checkpoint: `python -m fusion_jax.serve --checkpoint DIR`."""
