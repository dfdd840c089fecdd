"""Shared by all tests: CPU, a compilation cache so that equal programs compile once, run-time shape checks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Annotated shapes are checked while testing only.
install_import_hook("fusion_jax.models", "beartype.beartype")
install_import_hook("fusion_jax.losses", "beartype.beartype")

jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
