"""Trains a model: `python -m fusion_jax.train --config configs/quickstart.py --workdir runs/quickstart`.

Trains the stages of the config one after the other, each from the parameters of the one before. Started again with the
same workdir, it continues from the newest checkpoint and gives the same losses as an undisturbed run. A request to stop
(SIGTERM, Ctrl-C, a preemption notice) makes it save and exit with code 75: start it again to continue.
"""

from pathlib import Path

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.devices import distributed
from fusion_jax.errors import UserError
from fusion_jax.training.memory import explain_memory_errors
from fusion_jax.training.profiling import parse_steps
from fusion_jax.training.resume import INPUTS
from fusion_jax.training.run import train
from fusion_jax.training.stopping import Stop, end_together


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --workdir DIR.")
    values = flags.FLAGS
    if values.workdir is None or values.config is None:
        raise UserError("Give --config FILE and --workdir DIR.")
    if "://" in values.workdir:
        raise UserError(f"--workdir={values.workdir} must be a folder; mount the bucket and give the folder.")
    profile = parse_steps(values.profile_steps)
    with end_together():
        distributed.start(values.coordinator_address, values.num_processes, values.process_id)
        config = from_dict(RunConfig, values.config.to_dict())
        with Stop() as stop, explain_memory_errors(config.remat):
            train(config, Path(values.workdir), stop, profile, values.accept_changed)


def define_flags() -> None:
    """Defines the flags of this command; not at import, since other commands have flags of the same names."""
    define_config("run configuration")
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and plots")
    flags.DEFINE_list(
        "accept_changed",
        [],
        f"continue although these differ from the checkpoint's, any of: {', '.join(INPUTS)}; by default none may",
    )
    flags.DEFINE_string("profile_steps", "", "FIRST:LAST, steps of each stage to trace for XProf; by default none")
    # Needed only where no cluster (TPU, SLURM, Open MPI) provides them.
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, with several processes")
    flags.DEFINE_integer("num_processes", None, "number of processes that train together; by default the cluster's")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0; by default the cluster's")


if __name__ == "__main__":
    define_flags()
    run_main(main)
