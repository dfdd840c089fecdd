"""Compiles every program for GPUs as well as TPUs, in an environment of its own: CUDA's libraries take 4 GB."""

import re
import subprocess
import sys
import sysconfig
import venv
import zlib
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_FOLDER = _ROOT / ".venv-gpu"


def compile_all() -> str:
    """Runs tests/targets there; how many programs were as they are meant to be."""
    python = _environment()
    done = subprocess.run([python, "-m", "pytest", "tests/targets"], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert "skipped" not in last, last
    [passed] = re.findall(r"(\d+) passed", last)
    return f"{passed} tests of tests/targets passed"


def _environment() -> Path:
    """An interpreter that has all packages of this one and, in a folder of its own, those of the extra plan_gpu."""
    python = _FOLDER / "bin" / "python"
    files = b"".join((_ROOT / name).read_bytes() for name in ("requirements.txt", "setup.py"))
    stamp = _FOLDER / f"installed-{zlib.crc32(files)}"
    if not stamp.exists():
        venv.create(_FOLDER, clear=True, with_pip=True)
        ours, version = sysconfig.get_path("purelib"), f"python{sys.version_info.major}.{sys.version_info.minor}"
        (_FOLDER / "lib" / version / "site-packages" / "all.pth").write_text(
            f"import site; site.addsitedir({ours!r})\n"
        )
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        # The extra's name as packages carry it: older versions of pip know no other spelling.
        subprocess.run([*install, "-e", f"{_ROOT}[plan-gpu]"], check=True)
        stamp.touch()
    return python
