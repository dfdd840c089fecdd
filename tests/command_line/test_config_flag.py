"""Config files from any folder, with the package installed as a wheel: given, shipped, copied, misspelt."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_jax.command_line.config_flag import find_config, load_config, set_key
from fusion_jax.errors import UserError

ROOT = Path(__file__).parents[2]
# What a command does with its config before it does anything else.
SHOW = """
from absl import flags
from fusion_jax.command_line.cli import define_config, run_main
import fusion_jax
define_config("run")
def main(argv):
    config = flags.FLAGS.config
    print(fusion_jax.__file__)
    print(config.tokenizer, [stage["name"] for stage in config.stages])
run_main(main)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it, and nothing else."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("fusion_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=300)
    shutil.rmtree(source)
    return target


def run(installed, cwd, *arguments, command=("-c", SHOW)):
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    whole = [sys.executable, *command, *arguments]
    return subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def shown(installed, cwd, *arguments):
    done = run(installed, cwd, *arguments)
    assert done.returncode == 0, done.stderr
    path, line = done.stdout.splitlines()
    assert path == str(installed / "fusion_jax" / "__init__.py")
    return line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("flare.py:l_8b", "data/tokenizer_8b ['stage1', 'stage1_5', 'stage2']"),
        ("ablations.py:l_3b,A,stage1", "data/tokenizer_3b ['stage1']"),  # imports two others
        ("quickstart.py:x", "x/tokenizer ['stage1', 'stage1_5', 'stage2']"),
    ],
)
def test_a_shipped_config_is_found_from_any_folder(installed, tmp_path, name, line):
    assert shown(installed, tmp_path, f"--config=configs/{name}") == line
    assert shown(installed, tmp_path, "--config", f"configs/{name}") == line


def test_a_copied_config_works_in_any_folder(installed, tmp_path):
    shutil.copy(ROOT / "configs" / "ablations.py", tmp_path / "mine.py")
    assert shown(installed, tmp_path, "--config=mine.py:l_3b,stage2") == "data/tokenizer_3b ['stage2']"
    # In a folder of that name, beside which the others are those shipped.
    own = tmp_path / "project" / "configs"
    own.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "ablations.py", own / "mine.py")
    assert shown(installed, own.parent, "--config=configs/mine.py:l_3b,stage2") == "data/tokenizer_3b ['stage2']"
    assert shown(installed, own.parent, "--config=configs/flare.py:l_3b,stage1") == "data/tokenizer_3b ['stage1']"
    # The user's own come first, from other folders too.
    (own / "common.py").write_text((ROOT / "configs" / "common.py").read_text().replace("tokenizer_", "own_"))
    (own / "flare.py").write_text((ROOT / "configs" / "flare.py").read_text())
    assert shown(installed, tmp_path, f"--config={own}/mine.py:l_3b,stage2") == "data/own_3b ['stage2']"
    assert shown(installed, own.parent, "--config=configs/flare.py:l_3b,stage2") == "data/own_3b ['stage2']"


def test_a_command_runs_from_an_empty_folder(installed, tmp_path):
    command = ("-m", "fusion_jax.synthesize")
    done = run(installed, tmp_path, "--config=configs/quickstart_data.py:2,1,2,1,1", "--out=data", command=command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "stage1.yaml").is_file()


def test_a_config_that_is_not_there_is_named_with_where_it_was_looked_for(installed, tmp_path):
    (tmp_path / "mine.py").touch()
    for path, message in (
        (
            "configs/flair.py:l_3b",
            f"There is no config file configs/flair.py (looked in {tmp_path}/configs and "
            f"{installed}/fusion_jax/configs); did you mean configs/flare.py?",
        ),
        ("min.py", f"There is no config file min.py (looked in {tmp_path}); did you mean mine.py?"),
        ("/nowhere/x.py", "There is no config file /nowhere/x.py (looked in /nowhere)."),
    ):
        done = run(installed, tmp_path, f"--config={path}")
        assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {message}\n", "")


def test_the_given_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/flare.py") == str(ROOT / "configs" / "flare.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "flare.py").touch()
    assert find_config("configs/flare.py") == "configs/flare.py"
    for odd in ("x" * 300, "", "/"):
        assert find_config(odd) == odd
    with pytest.raises(UserError, match=r"There is no config file gone/flare\.py"):
        find_config("gone/flare.py")


# Config files that a command loads besides its own.


def test_a_file_that_loads_another_keeps_its_own_names(tmp_path):
    """A study reads the config of its base."""
    (tmp_path / "inner.py").write_text(
        '"""Inner."""\nfrom ml_collections import ConfigDict\nNAME = "inner"\n'
        "def get_config(text='x'):\n    return ConfigDict({'text': text, 'name': NAME})\n"
    )
    (tmp_path / "outer.py").write_text(
        '"""Outer."""\nfrom fusion_jax.command_line.config_flag import load_config\nNAME = "outer"\n'
        f"def get_config():\n    config = load_config('{tmp_path}/inner.py:a:b')\n"
        "    config.outer = [NAME, __doc__]\n    return config\n"
    )
    config = load_config(str(tmp_path / "outer.py"))
    assert config.to_dict() == {"text": "a:b", "name": "inner", "outer": ["outer", "Outer."]}


def test_keys_are_set_as_on_the_command_line(tmp_path):
    config = load_config("configs/quickstart.py:data")
    set_key(config, "model.llm.layers", 7)
    set_key(config, "stages[-1].learning_rate", 1)
    set_key(config, "model.new", 1)
    assert (config.model.llm.layers, config.stages[-1].learning_rate, config.model.new) == (7, 1, 1)
    for key, says in {
        "modl.llm.layers": "config.modl is not a key; did you mean model",
        "stages[9].steps": "stages of the config file has no 9",
        "stages.steps": "stages of the config file has no",
        "model..x": "is not a key; write --config.model.llm.layers",
    }.items():
        with pytest.raises(UserError, match=re.escape(says)):
            set_key(config, key, 1)


def test_loading_a_file_names_what_is_wrong(tmp_path):
    file = tmp_path / "bad.py"
    for text, says in {
        "x = 1": "has no attribute 'get_config'",
        "def get_config(:": "line 1: invalid syntax",
        "import fusion_jaxx": "line 1: ModuleNotFoundError",
        "def get_config(): raise ValueError('no')": "line 1: ValueError: no",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(says)):
            load_config(str(file))
    with pytest.raises(UserError, match="There is no config file"):
        load_config(str(tmp_path / "none.py:x"))
