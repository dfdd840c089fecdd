"""Trains an export with TRL in an environment of its own, .venv-trl, on top of the packages of this one."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import fixtures

_ROOT = Path(__file__).parents[1]
PACKAGES = ("transformers==5.24.0", "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")


def train(folder: Path) -> str:
    """First and last losses of every way of `interop/trl_runs.py`."""
    command = [_environment(), _ROOT / "tests" / "interop" / "trl_runs.py", _export(folder)]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    runs = re.findall(r"^(\w+): ([\d.]+ to [\d.]+)$", done.stdout, re.MULTILINE)
    [versions] = re.findall(r"^transformers .*$", done.stdout, re.MULTILINE)
    return f"{versions}: losses of " + ", ".join(f"{name} {losses}" for name, losses in runs)


def _export(folder: Path) -> Path:
    from interop.test_torch_model import TEMPLATES, export, load_tokenizer, train_tokenizer

    texts = ["What colour is it? Please.", "It is red.", "It is blue."] * 20
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "tokenizer", 300))
    config = fixtures.tiny("paper", **{"llm.vocab_size": tokenizer.vocab_size})
    made = folder / "export"
    made.mkdir()
    export(made, config, fixtures.params(config), tokenizer, TEMPLATES["phi3"])
    return made


def _environment() -> Path:
    """An interpreter with PACKAGES and all other packages of this one."""
    folder = _ROOT / ".venv-trl"
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        venv.create(folder, clear=True, with_pip=True)
        ours, name = sysconfig.get_path("purelib"), f"python{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "lib" / name / "site-packages" / "all.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES], check=True)
        stamp.touch()
    return python
