"""Shared by all tests: CPU, compiling fast, a cache so that equal programs compile once, run-time shape checks."""

import os
import signal

# A shell's background job has these ignored, and so would have what tests start, to which they send them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Most of a test is compilation of a program that runs once or twice on tiny arrays: optimised little, whole training
# runs included, it takes a third of the time. Processes that tests start inherit this.
_FAST_COMPILE = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones end at once over a flag that they do not know
    _FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_FAST_COMPILE} {os.environ.get('XLA_FLAGS', '')}"

# Annotated shapes are checked while testing only.
install_import_hook("fusion_jax.models", "beartype.beartype")
install_import_hook("fusion_jax.training.losses", "beartype.beartype")

jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: two processes share the files, and none should be left alone with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
