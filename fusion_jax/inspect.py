"""Shows what a run will read: `python -m fusion_jax.inspect --config FILE [--out page.html]`.

For each stage, or the one named: how long its conversations are, what they hold, what is wrong with some, what they
cost and how they fill the rows of a step, for every data set of the mixture. All figures are of a sample of records
(`--limit`, 0 for all), except the numbers of records. The last line is one JSON object with all of them.

With `--out` also a page to open in a browser: the same figures, and rows of the run's first steps as the model gets
them: pictures, every token, what is supervised.
"""

import json
from pathlib import Path

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.errors import UserError
from fusion_jax.inspection.inspect import Options, inspect


def define_flags() -> None:
    """The command's flags."""
    define_config("run configuration")
    flags.DEFINE_string("stage", Options.stage, "name of one stage (default: all of the configuration)")
    flags.DEFINE_integer("limit", Options.limit, "records of each stage to measure; 0: all")
    flags.DEFINE_integer("images", Options.images, "records of each stage whose images are decoded to find bad ones")
    flags.DEFINE_string("out", None, "HTML page to write (default: none)")
    flags.DEFINE_integer("rows", Options.rows, "rows of each stage on the page")
    flags.DEFINE_integer("devices", Options.devices, "devices that the rows of a step are divided over")
    flags.DEFINE_alias("samples", "limit")  # its name until 0.2


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE.")
    if values.config is None:
        raise UserError("Give --config FILE.")
    options = Options(values.stage, values.limit, values.images, values.rows, values.devices)
    config = from_dict(RunConfig, values.config.to_dict())
    print(json.dumps(inspect(config, options, Path(values.out) if values.out else None)))


if __name__ == "__main__":
    define_flags()
    run_main(main)
