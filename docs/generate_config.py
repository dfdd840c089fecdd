"""Writes docs/config.md, the reference of the configuration, from the dataclasses' own lines of documentation.

    python docs/generate_config.py

tests/test_config_docs.py fails where the page is not what this writes.
"""

import ast
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fusion_jax import config  # noqa: E402
from fusion_jax.models import config as model  # noqa: E402
from fusion_jax.models.limits import RANGES  # noqa: E402
from fusion_jax.studies import config as studies  # noqa: E402
from fusion_jax.synth import config as synth  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Configuration

<!-- Written by docs/generate_config.py; do not edit. -->

A config file is a Python file with a function `get_config`, which returns these keys as a ConfigDict;
`configs/common.py` adds the defaults. Any key can be set on the command line, too: `--config.model.llm.layers=4`,
`'--config.stages[0].steps=100'`. A key that is misspelt or has a value that is not allowed ends the command with one
sentence and exit code 2.
"""
STUDIES_HEAD = """# Configuration of studies

The keys of `python -m fusion_jax.study --config` ([studies.md](studies.md)).
"""
SYNTHESIS_HEAD = """# Configuration of synthesis

The keys of `python -m fusion_jax.synthesize --config`.
"""


@dataclass(frozen=True)
class Part:
    """One dataclass of the configuration.

    Attributes:
      prefix: what stands before its fields in a key, such as `config.mesh`. also: another prefix for the same keys.
      choices: the allowed values by field.
    """

    kind: type
    prefix: str
    choices: dict[str, Any] = field(default_factory=dict)
    also: str = ""


TRAINING = (
    Part(config.RunConfig, "config", config.RUN_CHOICES),
    Part(config.StageConfig, "config.stages[i]", config.STAGE_CHOICES),
    Part(config.MeshConfig, "config.mesh"),
    Part(model.FusionConfig, "config.model", model.CHOICES),
    Part(model.VisionConfig, "config.model.vision"),
    Part(model.LLMConfig, "config.model.llm"),
    Part(model.RopeConfig, "config.model.llm.rope", {"kind": model.ROPE_KINDS}),
    Part(model.ExchangeConfig, "config.model.exchange"),
)
STUDIES = (
    Part(studies.StudyConfig, "config"),
    Part(studies.EvaluationConfig, "config.evaluation", studies.EVALUATION_CHOICES),
    Part(studies.PublishedConfig, "config.published"),
)
SYNTHESIS = (
    Part(synth.SynthConfig, "config"),
    Part(synth.PoolConfig, "config.pools[i]"),
    Part(synth.FilterConfig, "config.filters"),
    Part(synth.ModelConfig, "config.llm", also="config.vision"),
    Part(synth.ImageConfig, "config.images"),
    Part(synth.ScorerConfig, "config.scorer"),
    Part(synth.SelectConfig, "config.select"),
    Part(synth.RayConfig, "config.ray"),
)


def ranges(kind: type) -> dict[str, tuple[float, float]]:
    """Least and most value by field, from the tables of the dataclass's module."""
    if kind.__module__ == model.__name__:
        return {"heads": RANGES["heads"]} if kind is model.ExchangeConfig else RANGES
    tables = {name: table for name, table in vars(sys.modules[kind.__module__]).items() if name.endswith("_RANGES")}
    own = tables.get(f"{kind.__name__.removesuffix('Config').upper()}_RANGES")  # RunConfig has RUN_RANGES
    return own if own is not None else {name: pair for table in tables.values() for name, pair in table.items()}


def fields(kind: type) -> dict[str, tuple[str, str, str]]:
    """Type, default and line of documentation of each field, as they stand in the source; no line is an empty one."""
    source = inspect.getsource(kind)
    body = ast.parse(source).body[0].body
    found = {}
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            value = node.value and ast.get_source_segment(source, node.value)
            is_line = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            line = " ".join(str(after.value.value).split()) if is_line else ""
            found[node.target.id] = (ast.get_source_segment(source, node.annotation), value or "", line)
    return found


def is_documented(part: Part) -> bool:
    """Whether every field has its line."""
    return all(line for _, _, line in fields(part.kind).values())


def page() -> str:
    """The whole page in Markdown. Synthesis is on it once all of its fields have their lines."""
    parts = [HEAD, *map(section, TRAINING), STUDIES_HEAD, *map(section, STUDIES)]
    if all(map(is_documented, SYNTHESIS)):
        parts += [SYNTHESIS_HEAD, *map(section, SYNTHESIS)]
    return "\n".join(parts)


def section(part: Part) -> str:
    """The heading of one dataclass, what it is, and the table of its fields."""
    summary = inspect.cleandoc(part.kind.__doc__) + (f" The same keys stand under `{part.also}`." if part.also else "")
    rows = [row(part, name, *about) for name, about in fields(part.kind).items()]
    head = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    return "\n".join([f"## {part.kind.__name__}", "", summary, "", *head, *rows, ""])


def row(part: Part, name: str, kind: str, default: str, line: str) -> str:
    """The row of one field."""
    if "default_factory=dict" in default:
        default = "{}"
    if default.endswith("Config()"):
        default = ""
    elif default:
        default = f"`{default}`"
    else:
        default = "required"
    allowed = ""
    if name in part.choices:
        allowed = ", ".join(f"`{value}`" for value in part.choices[name])
    elif name in ranges(part.kind):
        allowed = " to ".join(map(number, ranges(part.kind)[name]))
    cells = (f"`{part.prefix}.{name}`", f"`{kind}`", default, allowed, line)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float) -> str:
    """The shortest way to write it, 1e+06 instead of 1000000.0, without losing digits."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
