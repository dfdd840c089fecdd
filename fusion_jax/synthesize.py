"""Makes training data from captions, with models that write, draw and verify.

    python -m fusion_jax.synthesize --config configs/synthesize.py --out runs/synthesis

Captions in; images, conversations and the mixtures that training reads out (docs/synthesis.md). A run that was killed
goes on when the same command is started again, and ends with what an undisturbed run gives; nothing that was paid for
is paid for again. Stages can be run one at a time, `--stages filter,judge`: each goes on from the ones before it.
"""

import json
from pathlib import Path

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.errors import UserError
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.run import EVERY_STAGE, synthesize
from fusion_jax.values.dicts import from_dict


def define_flags() -> None:
    """The command's flags."""
    define_config("file of the synthesis configuration, with :ARGUMENT for its get_config")
    flags.DEFINE_string("out", None, "folder of the run: new, empty, or one that this configuration began")
    flags.DEFINE_list("stages", [], f"stages to run, of {', '.join(EVERY_STAGE)}; default: all")
    flags.DEFINE_bool("retry_failed", False, "try again what a failing endpoint dropped")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --out DIR.")
    if flags.FLAGS.out is None or flags.FLAGS.config is None:
        raise UserError("Give --config FILE and --out DIR.")
    config = from_dict(SynthConfig, flags.FLAGS.config.to_dict())
    manifest = synthesize(config, Path(flags.FLAGS.out), flags.FLAGS.stages, flags.FLAGS.retry_failed)
    print(json.dumps({key: manifest[key] for key in ("state", "captions", "records") if key in manifest}))


if __name__ == "__main__":
    define_flags()
    run_main(main, goes_on=lambda: True)
