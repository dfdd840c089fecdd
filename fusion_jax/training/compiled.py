"""Compiled programs, kept in the workdir: restarts, and stages of equal shapes, compile nothing again."""

import logging
import zlib
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("fusion_jax")

_BLOCK = 1 << 16
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def keep(folder: Path, first: bool) -> None:
    """Has JAX keep its programs in `folder`; a cache that the user has chosen is left alone.

    Args:
      first: of the processes of a run, the one that writes programs. It removes those that a kill or a full disk has
        cut short before it compiles any: JAX would neither use nor ever replace them.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    if not first:
        return
    for path in folder.glob("*-cache"):
        try:
            if path.is_file() and not _is_whole(path):
                log.warning("%s is cut short; its program is compiled again", path)
                path.unlink()
        except OSError as error:
            log.warning("%s stays as it is: %s", path, error)


def _is_whole(path: Path) -> bool:
    """Whether a compressed file comes to its end; one in a form that cannot be read here counts as whole."""
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
    """What reads a file with this beginning; None where nothing does."""
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
