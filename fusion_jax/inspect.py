"""What a run will read: `python -m fusion_jax.inspect --config FILE [--stage NAME] [--out page.html]`.

For each stage, or the one named: how long its conversations are, what they hold, what is wrong with some, what they
cost and how they fill the rows of a step, for every data set of the mixture. All figures are of a sample of records
(`--samples`, 0 for all), except the numbers of records. The last line is one JSON object with all of them.

With `--out` also a page to open in a browser: the same figures, and rows of the run's first steps as the model gets
them: pictures, every token, what is supervised.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from fusion_jax.command_line.cli import check_output, define_config, run_main
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError, check, check_choice
from fusion_jax.inspection import numbers as inspect_numbers
from fusion_jax.inspection import page as inspect_page
from fusion_jax.inspection import tables as inspect_tables
from fusion_jax.training import resume

SAMPLES, IMAGES, ROWS = 4000, 200, 9


@dataclass(frozen=True)
class Options:
    """What to look at: one stage or (empty) all; how many records; of how many the images; rows on the page; devices
    that a step's rows are dealt over."""

    stage: str = ""
    samples: int = SAMPLES
    images: int = IMAGES
    rows: int = ROWS
    devices: int = 1

    def __post_init__(self):
        for name, least in (("samples", 0), ("images", 0), ("rows", 0), ("devices", 1)):
            check(getattr(self, name) >= least, f"--{name}={getattr(self, name)} must be at least {least}.")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE.")
    if values.config is None:
        raise UserError("Give --config FILE.")
    options = Options(values.stage, values.samples, values.images, values.rows, values.devices)
    config = from_dict(RunConfig, values.config.to_dict())
    print(json.dumps(inspect(config, options, Path(values.out) if values.out else None)))


def inspect(config: RunConfig, options: Options, out: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Prints the tables, writes the page, returns all figures. UserError for what a run could not start with."""
    names = [stage.name for stage in config.stages]
    if options.stage:
        check_choice("--stage=", options.stage, names)
    if out is not None:
        check_output("out", out)
    with tempfile.TemporaryDirectory() as scratch:
        if config.init_from:
            config, tokenizer, _ = resume.start_from(config, Path(config.init_from), scratch)
        else:
            tokenizer = load_tokenizer(config.tokenizer, own=True)
        sections, found = [], []
        for stage in config.stages:
            if options.stage and stage.name != options.stage:
                continue
            opened = inspect_numbers.open_stage(config, stage, tokenizer, options.devices)
            looked = inspect_numbers.look(opened, options.samples, options.images, progress)
            figures = inspect_numbers.summary(opened, looked)
            tables = inspect_tables.stage_tables(figures)
            print(inspect_tables.as_text(figures, tables), flush=True)
            if out is not None:
                rows = inspect_numbers.sample_rows(opened, looked, options.rows)
                sections.append(inspect_page.stage_section(figures, tables, opened, looked, rows))
            found.append(figures)
    if out is not None:
        out.write_text(inspect_page.page(sections), encoding="utf-8", errors="backslashreplace")
        print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return {"stages": found, "page": str(out) if out else None}


if __name__ == "__main__":
    define_config("run configuration")
    flags.DEFINE_string("stage", "", "one stage; default: all of the config")
    flags.DEFINE_integer("samples", SAMPLES, "records to look at, of each stage; 0: all")
    flags.DEFINE_integer("images", IMAGES, "of how many of them to decode the images, to find bad ones")
    flags.DEFINE_string("out", None, "HTML page to write")
    flags.DEFINE_integer("rows", ROWS, "rows of each stage on the page")
    flags.DEFINE_integer("devices", 1, "devices that the rows of a step are dealt over")
    run_main(main)
