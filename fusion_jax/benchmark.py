"""Measures speed: `python -m fusion_jax.benchmark step|prefill|decode|serve|checkpoint|input`.

python -m fusion_jax.benchmark step --config configs/benchmark_cpu.py                  # or prefill, decode
python -m fusion_jax.benchmark step --config configs/flare.py:l_3b,stage1 --trace      # a run's step at its real shapes
python -m fusion_jax.benchmark decode --config configs/flare.py:l_3b --rows 32         # or prefill
python -m fusion_jax.benchmark serve --checkpoint runs/quickstart                      # the server, over HTTP
python -m fusion_jax.benchmark checkpoint --config configs/benchmark_cpu.py:checkpoint # what saving costs
python -m fusion_jax.benchmark input --workers 2 --decode fast                         # image files to crops, packing

Weights and tokens are random, but for serve with --checkpoint; the programs are those of training and generation. The
last line is one JSON object, and times in it are wall-clock medians after compilation.
"""

import contextlib
import json

import jax
from absl import flags

from fusion_jax.benchmarking import checkpoints, generation, input_pipeline, serving, steps
from fusion_jax.benchmarking.common import check_counts
from fusion_jax.command_line.cli import check_config, define_config, run_main
from fusion_jax.config import DECODES, RunConfig, from_dict
from fusion_jax.errors import UserError
from fusion_jax.models import weights
from fusion_jax.training.loading import find_checkpoint

KINDS = ("step", "prefill", "decode", "serve", "checkpoint", "input")


def define_flags() -> None:
    """Defines the command's flags; called only when it runs, as other commands have flags of the same names."""
    define_config("configuration of a benchmark or a run", "configs/benchmark_cpu.py", new_keys=False)
    flags.DEFINE_integer("workers", 1, "threads that make crops, for input")
    flags.DEFINE_enum("decode", "exact", DECODES, "how image files become crops, for input")
    flags.DEFINE_integer("latents", None, "latents l^2 of a round, for step of a run; by default the largest number")
    flags.DEFINE_boolean("trace", False, "list the most expensive operations, for step")
    flags.DEFINE_integer(
        "rows", None, "prompts at once, for prefill and decode of a run (default: 1) and serve (8)", lower_bound=1
    )
    flags.DEFINE_string("checkpoint", None, "checkpoint to serve; by default a run's --config with random weights")
    flags.DEFINE_integer("requests", 32, "requests at each number of clients, for serve", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 64, "longest answer in tokens, for serve", lower_bound=1)
    flags.DEFINE_enum("weights", "full", weights.KINDS, "how to store weights, for serve: see serve --weights")
    flags.DEFINE_string("server_flags", "", "further flags of the server, for serve, such as '--lengths=512'")


def measure(kind: str) -> dict:
    """Runs the benchmark `kind`, one of KINDS. Returns its JSON object without the names of benchmark and device."""
    config = flags.FLAGS.config
    check_config(config)
    if kind == "checkpoint" and "stages" in config:
        raise UserError("checkpoint is measured with a benchmark configuration such as configs/benchmark_cpu.py.")
    check_counts(config)
    if kind == "step":
        return steps.measure(config, flags.FLAGS.latents, flags.FLAGS.trace)
    if kind == "prefill":
        return generation.measure_prefill(config, flags.FLAGS.rows or 1)
    if kind == "decode":
        return generation.measure_decode(config, flags.FLAGS.rows or 1)
    return checkpoints.measure(config)


def measure_server() -> dict:
    """Runs the benchmark of the server, as `measure` does the others."""
    f = flags.FLAGS
    with contextlib.ExitStack() as stack:
        if f.checkpoint:
            checkpoint = find_checkpoint(f.checkpoint)
        else:
            check_config(f.config)
            if "stages" not in f.config:
                raise UserError(
                    "serve is measured with --checkpoint DIR or a run's --config, such as configs/flare.py."
                )
            config = from_dict(RunConfig, f.config.to_dict())
            checkpoint = stack.enter_context(serving.random_checkpoint(config))
        return serving.measure(checkpoint, f.rows or 8, f.requests, f.max_tokens, f.weights, f.server_flags)


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in KINDS:
        raise UserError(f"Say what to measure: python -m fusion_jax.benchmark {'|'.join(KINDS)} --config FILE.")
    kind = argv[1]
    if kind == "input":
        print(json.dumps({"benchmark": kind, **input_pipeline.measure(flags.FLAGS.workers, flags.FLAGS.decode)}))
        return
    result = measure_server() if kind == "serve" else measure(kind)
    print(json.dumps({"benchmark": kind, "device": jax.devices()[0].device_kind, **result}))


if __name__ == "__main__":
    define_flags()
    run_main(main)
