"""Tests that the Colab notebook is valid, that its Python compiles, and that the names in its commands exist."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
COMMANDS = [line[1:] for source in SOURCES for line in source.splitlines() if line.startswith("!")]


def python_of(source):
    return "\n".join("pass" if line.startswith("!") else line for line in source.splitlines())


def test_format_is_valid_and_nothing_was_run():
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code")


def test_python_compiles_and_names_are_defined_before_they_are_used():
    known = set(dir(__builtins__)) | set(__builtins__ if isinstance(__builtins__, dict) else ())
    for source in SOURCES:
        tree = ast.parse(python_of(source))
        known |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {alias.name for node in ast.walk(tree) for alias in getattr(node, "names", []) if node}
        known |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {
            name for line in source.splitlines() if line.startswith("!") for name in re.findall(r"\{(\w+)\}", line)
        }
        assert used <= known, used - known


def test_commands_name_modules_flags_and_configs_that_exist():
    ours = [shlex.split(command) for command in COMMANDS if "fusion_jax" in command]
    assert len(ours) >= 8
    for name in re.findall(r"(?:configs|docs)/\w+\.\w+", NOTEBOOK.read_text()):
        assert (ROOT / name).is_file(), name
    for words in ours:
        assert words[:2] == ["python", "-m"], words
        spec = importlib.util.find_spec(words[2])
        assert spec, words[2]
        text = Path(spec.origin).read_text()
        flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)) | ({"config"} if "define_config(" in text else set())
        for word in words:
            if word.startswith("--"):
                assert word.lstrip("-").split("=")[0].split(".")[0] in flags, word


def test_the_kind_of_runtime_is_found(monkeypatch):
    [source] = [source for source in SOURCES if "def accelerator" in source]

    def kind(devices):
        monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / d for d in devices if d.startswith("accel")])
        monkeypatch.setattr(Path, "exists", lambda path: str(path) in devices)
        names = {}
        exec("import os\nfrom pathlib import Path\n" + source, names)
        return names["KIND"], names["EXTRA"]

    for name in ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_1VM"):
        monkeypatch.delenv(name, raising=False)
    assert kind([]) == ("cpu", "")
    assert kind(["/proc/driver/nvidia/version"]) == ("gpu", "[gpu]")
    assert kind(["accel0"]) == ("tpu", "[tpu]")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    assert kind([]) == ("tpu", "[tpu]")


def test_without_code_the_first_cell_says_what_to_do(monkeypatch):
    source = SOURCES[0].replace("/content", "/nowhere")
    with pytest.raises(SystemExit, match="Give REPOSITORY, or upload"):
        exec(source, {})
