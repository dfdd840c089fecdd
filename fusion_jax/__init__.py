"""fusion_jax: vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX."""

__version__ = "0.1.0"
