"""Plans a run without its hardware: compiles the real train step for TPUs or GPUs on any machine.

python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology v5p:4x4x8
python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology v5e:16x16 --search
python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology h100:8x4      # four nodes of eight GPUs

Prints a table and, last, one JSON line; docs/scaling.md says what each figure means and where it comes from. It needs
`pip install -e '.[plan]'` (for GPUs `.[plan_gpu]`), a few GB of memory and some minutes, but no TPU, no
GPU and no data.
"""

import dataclasses
import json
import os

if __name__ == "__main__":
    # Set before JAX starts: with a compiler installed it would look for a TPU or a GPU, and warn that there is none.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised anyway; XLA logs slow compiling as one

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.devices import chips
from fusion_jax.errors import UserError
from fusion_jax.models.remat import POLICIES
from fusion_jax.planning import program, report, search


def define_flags() -> None:
    """Defines the command's flags; called only when it runs, as other commands have flags of the same names."""
    define_config("run configuration, such as configs/flare.py:l_8b,stage1")
    flags.DEFINE_string(
        "topology", None, "chips to plan for: GENERATION:SHAPE, such as v5p:4x4x8, or KIND:GPUSxNODES, such as h100:8x4"
    )
    flags.DEFINE_integer("slices", 1, "TPU slices of that shape, joined by the data centre's network", lower_bound=1)
    flags.DEFINE_string("mesh", "", "mesh as AXIS=SIZE,..., such as fsdp=64,tensor=2; by default the config's")
    flags.DEFINE_string("stage", "", "name of the config's stage to plan; by default its first")
    flags.DEFINE_integer(
        "latents", None, "latents l^2 of a round; by default the largest number, which takes most memory"
    )
    flags.DEFINE_bool(
        "largest", False, "plan the largest size of steps, which takes most memory, not the most frequent size"
    )
    flags.DEFINE_float(
        "samples", None, "samples of the whole stage, for chip-hours; by default the published number", lower_bound=1
    )
    flags.DEFINE_bool("search", False, "try remat policies, meshes, both gathers and batch sizes, one compilation each")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --topology KIND:SHAPE.")
    if values.config is None or values.topology is None:
        raise UserError("Give --config FILE and --topology KIND:SHAPE, such as v5p:4x4x8 or h100:8.")
    topology = chips.topology(values.topology, values.slices)
    config = from_dict(RunConfig, values.config.to_dict())
    config = dataclasses.replace(config, mesh=program.parse_mesh(values.mesh, config.mesh))
    stage = program.find_stage(config, values.stage)
    samples = values.samples or report.STAGE_SAMPLES.get(stage.name)
    if values.search:
        reports = search.search(config, stage, topology, tuple(POLICIES), values.latents)
        print(search.ranking(reports))
        best = reports[0]
    else:
        best = report.analyse(program.compile_step(config, stage, topology, values.latents, values.largest), topology)
    print(report.table(best, samples))
    print(json.dumps(report.line(best, samples)))


if __name__ == "__main__":
    define_flags()
    run_main(main)
