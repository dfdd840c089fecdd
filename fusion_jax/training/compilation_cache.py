"""Keeps compiled programs in the workdir, so that restarts and equal stages compile nothing again."""

import logging
import zlib
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("fusion_jax")

_BLOCK = 1 << 16
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def keep_programs(folder: Path, first: bool) -> None:
    """Makes JAX cache its programs in `folder`, unless the user has chosen a cache.

    Args:
      first: this process writes the programs of the run. It removes those that a kill or a full disk has truncated
        before it compiles any: JAX would neither use nor ever replace them.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    if not first:
        return
    for path in folder.glob("*-cache"):
        try:
            if path.is_file() and not _is_complete(path):
                log.warning("%s is truncated; its program is compiled again", path)
                path.unlink()
        except OSError as error:
            log.warning("%s stays as it is: %s", path, error)


def _is_complete(path: Path) -> bool:
    """Returns whether a compressed file is complete; one in a format that cannot be read here counts as complete."""
    with path.open("rb") as file:
        block = file.read(_BLOCK)
        reader = _decompressor(block)
        if reader is None:
            return bool(block)
        try:
            while block and not reader.eof:
                reader.decompress(block)
                block = file.read(_BLOCK)
        except Exception:  # zlib and zstandard each have their own error
            return False
        return reader.eof


def _decompressor(start: bytes) -> Any:
    """Returns a decompressor for a file with this beginning; None if there is none."""
    if start[:1] == b"\x78":
        return zlib.decompressobj()
    if start.startswith(_ZSTANDARD):
        try:  # in the order in which JAX looks for them
            from compression.zstd import ZstdDecompressor

            return ZstdDecompressor()
        except ImportError:
            pass
        try:
            import zstandard

            return zstandard.ZstdDecompressor().decompressobj()
        except ImportError:
            pass
    return None
