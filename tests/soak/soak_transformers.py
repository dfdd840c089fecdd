"""Tries exported models in every way of `interop/ways.py` under several versions of transformers, each with accelerate
and peft in an environment of its own: .venv-transformers-VERSION, on top of the packages of this one."""

import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path

from helpers import fixtures, side_environment

_ROOT = Path(__file__).parents[2]
# The oldest that is supported, the first and a middle one of 5, and the newest; the tests have that, too.
VERSIONS = ("4.57.6", "5.0.0", "5.12.1", "5.24.0")
MODELS = {
    "paper": fixtures.tiny(**{"latent_counts": (4, 9, 1)}),
    "released, tied": fixtures.tiny("released", **{"llm.tied_head": True}),
    "tiles": fixtures.tiny(tile_grids=((1, 2), (2, 2)), tile_tokens=4),
}


def all_versions(folder: Path, versions: tuple[str, ...] = VERSIONS) -> str:
    """How many ways are right with each version; AssertionError with what is not."""
    folders = _exports(folder)
    passed, wrong = [], []
    for version in versions:
        # torch is there, and no version of it is asked for anew; all that transformers pins comes with it.
        packages = [f"transformers=={version}"], ["--no-deps", "accelerate==1.15.0", "peft==0.21.2"]
        python, count = side_environment.interpreter(f"transformers-{version}", *packages), 0
        for name, export in folders.items():
            environment = os.environ | {"HF_MODULES_CACHE": str(folder / f"modules-{version}")}
            command = [python, _ROOT / "tests" / "interop" / "ways.py", export]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert f"transformers {version}" in done.stdout, done.stdout + done.stderr[-3000:]
            ways = re.findall(r"^(\w+): (\w+)(.*)$", done.stdout, re.MULTILINE)
            count += sum(result == "right" for _, result, _ in ways)
            wrong += [f"{version}, {name}: {way}: {result}{rest}" for way, result, rest in ways if result != "right"]
        passed.append(f"{version}: {count}")
    assert not wrong, "\n".join(wrong)
    return f"ways that answer as the plain model, over {len(folders)} models: " + ", ".join(passed)


def _exports(folder: Path) -> dict[str, Path]:
    """An exported folder of every model, with a small tokenizer."""
    from helpers.exported_model import CHATS, export

    from fusion_jax.data.templates import TEMPLATES
    from fusion_jax.data.tokenizer import load_tokenizer
    from fusion_jax.synth.tokenizer import train_tokenizer

    texts = [text for rounds in CHATS.values() for r in rounds for text in r if text]
    tokenizer = load_tokenizer(train_tokenizer(texts * 20, folder / "tokenizer", 300))
    folders = {}
    for name, config in MODELS.items():
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=tokenizer.vocab_size))
        folders[name] = Path(tempfile.mkdtemp(dir=folder))
        export(folders[name], config, fixtures.params(config), tokenizer, TEMPLATES["phi3"])
    return folders
