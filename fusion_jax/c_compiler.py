"""Compiles the package's C files with the system's compiler, once for each machine.

The C compiler ($CC, cc, gcc or clang) builds a library in the user's cache folder, named by a hash of all that decides
what is in it, so that it is built once, and again after a change. Any number of processes may do so at once.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def build(name: str, sources: Sequence[Path], flags: Sequence[str], depends_on: object = None) -> Path:
    """Returns the compiled library, which it builds if the cache folder does not have it.

    Args:
      name: of the library. sources: its C files, and the headers that they include.
      flags: the compiler's flags, those for a shared library included.
      depends_on: what else the result depends on, such as the processor if it is compiled for this one.

    Raises:
      OSError: there is no compiler, it fails, or the cache folder cannot be written. RuntimeError: there is no home
      folder. subprocess.SubprocessError: the compiler does not end.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang) is installed, and $CC names none")
    command = [*([compiler] if isinstance(compiler, str) else compiler), *flags]
    what = repr(
        (
            [source.read_bytes() for source in sources],
            command,
            platform.system(),
            platform.machine(),
            platform.libc_ver(),
            depends_on,
        )
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusion_jax")
    path = cache / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # in the same file system, so that replacing is one step
        made = Path(folder, path.name)
        run = [*command, "-o", str(made), *(str(one) for one in sources if one.suffix == ".c"), "-lm"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise OSError(f"{shlex.join(run)} failed: {done.stderr.strip()[-500:]}")
        os.replace(made, path)
    return path
