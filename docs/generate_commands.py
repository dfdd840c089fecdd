"""Writes docs/commands.md, the reference of the commands, from what `--help` prints.

    JAX_PLATFORMS=cpu python docs/generate_commands.py

tests/test_docs.py fails where the page is not what this writes.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
HEAD = """# Commands

<!-- Written by docs/generate_commands.py; do not edit. -->

Every command is `python -m fusion_jax.NAME`. The values of a list are separated by commas. `--config FILE:ARGUMENTS`
names a Python file with a function `get_config`; any key of what it returns can be set, as in
`--config.model.llm.layers=4`. The exit codes are in [restart.md](restart.md#exit-codes).
"""


def commands() -> list[str]:
    """The names of the commands: the modules at the root of the package that can be run."""
    paths = sorted((ROOT / "fusion_jax").glob("*.py"))
    return [path.stem for path in paths if 'if __name__ == "__main__":' in path.read_text()]


def page() -> str:
    """The whole page in Markdown."""
    return "\n".join([HEAD, *map(section, commands())])


def section(name: str) -> str:
    """The description of one command and a table of its flags."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"fusion_jax.{name}")
    module.define_flags()
    own = [flag for flag in sorted(set(flags.FLAGS) - before) if flag == "config" or is_ours(flag)]
    rows = [row(flags.FLAGS[flag]) for flag in own]
    for flag in set(flags.FLAGS) - before:
        if flag in own:
            delattr(flags.FLAGS, flag)
    table = ["| flag | default | meaning |", "|---|---|---|", *rows] if rows else ["It has no flags."]
    return "\n".join([f"## {name}", "", "```text", inspect.cleandoc(module.__doc__), "```", "", *table, ""])


def is_ours(name: str) -> bool:
    """Whether the flag belongs to this package, and not to a library that a command imports."""
    module = str(flags.FLAGS.find_module_defining_flag(name))
    return module.startswith("fusion_jax")


def row(flag: flags.Flag) -> str:
    """The row of a flag: its name and values, its default, and its help text."""
    values = getattr(flag.parser, "enum_values", None)
    name = f"`--{flag.name}`" + (": " + ", ".join(f"`{value}`" for value in values) if values else "")
    text = " ".join((flag.help or "").split())
    if values:  # absl writes the values of an enum before its help text
        text = text.removeprefix(f"<{'|'.join(values)}>:").strip()
    text = re.sub(r"^Alias for --(\w+)\.$", r"former name of `--\1`", text)
    default = "" if flag.default in (None, "", []) else f"`{flag.default_as_str.strip(chr(39))}`"
    return f"| {name} | {default} | {escaped(text)} |"


def escaped(text: str) -> str:
    """The text as a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
