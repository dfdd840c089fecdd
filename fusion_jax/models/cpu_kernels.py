"""Compiles the C kernels for this processor on first use, and registers them with XLA.

They compute what XLA's own products and elementwise passes do with more memory traffic: attention (cpu_attention.c),
and the tokens of an answer (cpu_decoding.c). Without a C compiler XLA does the work, and the log says so once.
"""

import ctypes
import functools
import logging
import subprocess
import threading
from pathlib import Path

import jax

from fusion_jax import c_compiler

log = logging.getLogger("fusion_jax")

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_attention.c", "cpu_decoding.c", "cpu_kernels.h"))
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
FORWARD, BACKWARD = "fusion_attention_forward", "fusion_attention_backward"
CACHED, INT8 = "fusion_cached_attention", "fusion_int8_product"
_lock = threading.Lock()


def available() -> bool:
    """Returns whether the library is there; compiles and registers it with JAX when first asked."""
    with _lock:  # threads that come in the meantime wait for the one compilation
        return _register()


@functools.cache
def _register() -> bool:
    try:
        library = ctypes.CDLL(str(_build()))
        for name in (FORWARD, BACKWARD, CACHED, INT8):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        return True
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:  # RuntimeError: there is no home folder
        log.warning("Attention runs on XLA's products, at half the speed: %s", e)
        return False


def _build() -> Path:
    """Returns the library for this processor."""
    flags = (*FLAGS, f"-I{jax.ffi.include_dir()}")
    return c_compiler.build("cpu_kernels", SOURCES, flags, (_processor(), jax.__version__))


def _processor() -> str:
    """Returns the instructions that this processor has: homes, and so caches, may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
