"""Inspects what a run will read: prints tables, writes the page, returns all figures."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.command_line.cli import check_output
from fusion_jax.config import RunConfig
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import check, check_choice
from fusion_jax.inspection.figures import summary
from fusion_jax.inspection.page import page, stage_section
from fusion_jax.inspection.sample import draw_sample, open_stage
from fusion_jax.inspection.steps import sample_rows
from fusion_jax.inspection.tables import as_text, stage_tables
from fusion_jax.training import resume


@dataclass(frozen=True)
class Options:
    """What to inspect.

    Attributes:
      stage: the name of one stage; empty: all.
      limit: records of each stage to measure, 0 for all. images: how many of them have their images decoded.
      rows: rows of each stage on the page. devices: devices over which the rows of a step are divided.
    """

    stage: str = ""
    limit: int = 4000
    images: int = 200
    rows: int = 9
    devices: int = 1

    def __post_init__(self):
        for name, least in (("limit", 0), ("images", 0), ("rows", 0), ("devices", 1)):
            check(getattr(self, name) >= least, f"--{name}={getattr(self, name)} must be at least {least}.")


def inspect(config: RunConfig, options: Options, out: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Prints the tables, writes the page, and returns all figures.

    Args:
      out: the HTML page; None: no page is written. progress: show progress bars.

    Raises:
      UserError: a run of this configuration could not start, or `out` cannot be written.
    """
    if options.stage:
        check_choice("--stage=", options.stage, [stage.name for stage in config.stages])
    if out is not None:
        check_output("out", out)
    with tempfile.TemporaryDirectory() as scratch:
        if config.init_from:
            config, tokenizer, _ = resume.start_from(config, Path(config.init_from), scratch)
        else:
            tokenizer = load_tokenizer(config.tokenizer, own=True)
        sections, stages = [], []
        for stage in config.stages:
            if options.stage and stage.name != options.stage:
                continue
            data = open_stage(config, stage, tokenizer, options.devices)
            sample = draw_sample(data, options.limit, options.images, progress)
            figures = summary(data, sample)
            tables = stage_tables(figures)
            print(as_text(figures, tables), flush=True)
            if out is not None:
                rows = sample_rows(data, sample, options.rows)
                sections.append(stage_section(figures, tables, data, sample, rows))
            stages.append(figures)
    if out is not None:
        out.write_text(page(sections), encoding="utf-8", errors="backslashreplace")
        print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return {"stages": stages, "page": str(out) if out else None}
