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
from fusion_jax.synth import config as synth  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Configuration

<!-- Written by docs/generate_config.py; do not edit. -->

A config file is a Python file with a function `get_config`, which returns these keys as a ConfigDict;
`configs/common.py` adds the defaults. Any key can be set on the command line, too: `--config.model.llm.layers=4`,
`'--config.stages[0].steps=100'`. A key that is misspelt or has a value that is not allowed ends the command with one
sentence and exit code 2.
"""
SYNTHESIS = """# Configuration of synthesis

The keys of `python -m fusion_jax.synthesize --config`.
"""


@dataclass(frozen=True)
class Part:
    """One dataclass of the configuration.

    Attributes:
      prefix: what stands before its fields in a key, such as `config.mesh`.
      ranges: least and most value by field. choices: the allowed values by field.
    """

    kind: type
    prefix: str
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)


TRAINING = (
    Part(config.RunConfig, "config", config.RUN_RANGES, config.RUN_CHOICES),
    Part(config.StageConfig, "config.stages[i]", config.STAGE_RANGES, config.STAGE_CHOICES),
    Part(config.MeshConfig, "config.mesh", config.MESH_RANGES),
    Part(model.FusionConfig, "config.model", RANGES, model.CHOICES),
    Part(model.VisionConfig, "config.model.vision", RANGES),
    Part(model.LLMConfig, "config.model.llm", RANGES),
    Part(model.RopeConfig, "config.model.llm.rope", RANGES, {"kind": model.ROPE_KINDS}),
    Part(model.ExchangeConfig, "config.model.exchange", {"heads": RANGES["heads"]}),
)
_ASKED = {"backend": synth.LANGUAGE_BACKENDS, "structured": synth.STRUCTURED}
SYNTHESIZING = (
    Part(synth.SynthConfig, "config", synth._RUN_RANGES, {"engine": synth.ENGINES}),
    Part(synth.PoolConfig, "config.pools[i]"),
    Part(synth.FilterConfig, "config.filters", synth._FILTER_RANGES),
    Part(synth.ModelConfig, "config.llm` and `config.vision", synth._MODEL_RANGES | synth._TRAFFIC_RANGES, _ASKED),
    Part(
        synth.ImageConfig,
        "config.images",
        synth._IMAGE_RANGES | synth._TRAFFIC_RANGES,
        {"backend": synth.IMAGE_BACKENDS},
    ),
    Part(synth.ScorerConfig, "config.scorer"),
    Part(synth.SelectConfig, "config.select", synth._SELECT_RANGES),
    Part(synth.RayConfig, "config.ray"),
)


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


def page() -> str:
    """The whole page in Markdown. Synthesis is on it once all of its fields have their lines."""
    parts = [HEAD, *map(section, TRAINING)]
    if all(line for part in SYNTHESIZING for _, _, line in fields(part.kind).values()):
        parts += [SYNTHESIS, *map(section, SYNTHESIZING)]
    return "\n".join(parts)


def section(part: Part) -> str:
    """The heading of one dataclass, what it is, and the table of its fields."""
    summary = inspect.cleandoc(part.kind.__doc__)
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
    elif name in part.ranges:
        allowed = " to ".join(map(number, part.ranges[name]))
    cells = (f"`{part.prefix}.{name}`", f"`{kind}`", default, allowed, line)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float) -> str:
    """The shortest way to write it, 1e+06 instead of 1000000.0, without losing digits."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
