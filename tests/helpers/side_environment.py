"""Interpreters with packages on top of those of this one: what has pins of its own, or the test extra leaves out."""

import hashlib
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def interpreter(name: str, *installs: Sequence[str], pins: Sequence[Path] = ()) -> Path:
    """The interpreter of .venv-NAME, which has all packages of this one behind its own; made at the first call, and
    anew where `installs`, the arguments of pip for each of its runs, or the files `pins` have changed."""
    folder = _ROOT / f".venv-{name}"
    wanted = repr(installs).encode() + b"".join(path.read_bytes() for path in pins)
    stamp = folder / f"installed-{hashlib.sha256(wanted).hexdigest()[:16]}"
    python = folder / "bin" / "python"
    if not stamp.exists():
        venv.create(folder, clear=True, with_pip=True)
        ours, version = sysconfig.get_path("purelib"), f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "lib" / version / "site-packages"
        (packages / "all.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        for arguments in installs:
            install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
            subprocess.run([*install, *arguments], check=True)
        stamp.touch()
    return python
