"""Trains an export with TRL in an environment of its own, .venv-trl, on top of the packages of this one."""

import os
import re
import subprocess
from pathlib import Path

from helpers import fixtures, side_environment

_ROOT = Path(__file__).parents[2]
PACKAGES = ("transformers==5.24.0", "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")


def train(folder: Path) -> str:
    """First and last losses of every way of `interop/trl_runs.py`."""
    python = side_environment.interpreter("trl", PACKAGES)
    command = [python, _ROOT / "tests" / "interop" / "trl_runs.py", _export(folder)]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    runs = re.findall(r"^(\w+): ([\d.]+ to [\d.]+)$", done.stdout, re.MULTILINE)
    [versions] = re.findall(r"^transformers .*$", done.stdout, re.MULTILINE)
    return f"{versions}: losses of " + ", ".join(f"{name} {losses}" for name, losses in runs)


def _export(folder: Path) -> Path:
    from helpers.exported_model import export

    from fusion_jax.data.conversation import TEMPLATES
    from fusion_jax.data.tokenizer import load_tokenizer
    from fusion_jax.synth.tokenizer import train_tokenizer

    texts = ["What colour is it? Please.", "It is red.", "It is blue."] * 20
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "tokenizer", 300))
    config = fixtures.tiny("paper", **{"llm.vocab_size": tokenizer.vocab_size})
    exported = folder / "export"
    exported.mkdir()
    export(exported, config, fixtures.params(config), tokenizer, TEMPLATES["phi3"])
    return exported
