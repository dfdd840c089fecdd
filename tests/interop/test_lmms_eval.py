"""The names under which lmms-eval finds the model class; lmms-eval itself need not be installed."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def source(module):
    return Path(importlib.util.find_spec(module).origin).read_text()


def test_the_entry_point_and_the_class_path_name_what_exists():
    entry = re.search(r'"lmms_eval\.models": \["fusion_jax = ([\w.]+):(\w+)"\]', (ROOT / "setup.py").read_text())
    plugin = source(entry[1])
    assert f"\n{entry[2]} = " in plugin
    module, name = re.search(r'simple_class_path="([\w.]+)\.(\w+)"', plugin).groups()
    assert f"\nclass {name}(lmms):" in source(module)
