"""Planning without the hardware: compiles the real train step for TPUs or GPUs on any machine and says what it needs.

python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology v5p:4x4x8
python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology v5e:16x16 --search
python -m fusion_jax.plan --config configs/flare.py:l_8b,stage1 --topology h100:8x4      # four nodes of eight GPUs

Prints a table and, last, one JSON line; docs/scaling.md says what each figure means and where it comes from. Needs
`pip install fusion_jax[plan]` (for GPUs `plan_gpu`), a few GB of memory and some minutes; no TPU or GPU and no data.
"""

import dataclasses
import json
import os

# Before JAX starts: with a compiler installed it would look for a TPU or a GPU, and complain that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what goes wrong is raised; XLA calls slow compiling an error

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, StageConfig, from_dict
from fusion_jax.devices import chips
from fusion_jax.errors import UserError, check_choice
from fusion_jax.models.remat import POLICIES
from fusion_jax.planning import program, report, search

_CONFIG = define_config("run configuration, one of configs/")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "chips: generation:shape, such as v5p:4x4x8, or kind:GPUSxNODES, such as h100:8x4"
)
_SLICES = flags.DEFINE_integer(
    "slices", 1, "TPU slices of that shape, joined by the data centre's network", lower_bound=1
)
_MESH = flags.DEFINE_string("mesh", "", "axis=size,... instead of the config's, such as fsdp=64,tensor=2")
_STAGE = flags.DEFINE_string("stage", "", "which of the config's stages; by default its first")
_LATENTS = flags.DEFINE_integer("latents", None, "l^2; by default the largest, which takes most memory")
_SAMPLES = flags.DEFINE_float(
    "samples", None, "samples of the whole stage, for chip-hours; by default the published", lower_bound=1
)
_SEARCH = flags.DEFINE_bool("search", False, "try remat policies, meshes and batch sizes, one compilation each")


def find_stage(config: RunConfig, name: str) -> StageConfig:
    """The stage of that name, the first without one. UserError where there is none."""
    found = [stage for stage in config.stages if name in ("", stage.name)]
    if not found:
        check_choice("--stage=", name, [stage.name for stage in config.stages])
    return found[0]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --topology KIND:SHAPE.")
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise UserError("Give --config FILE and --topology KIND:SHAPE, such as v5p:4x4x8 or h100:8.")
    topology = chips.topology(_TOPOLOGY.value, _SLICES.value)
    config = from_dict(RunConfig, _CONFIG.value.to_dict())
    config = dataclasses.replace(config, mesh=program.parse_mesh(_MESH.value, config.mesh))
    stage = find_stage(config, _STAGE.value)
    samples = _SAMPLES.value or report.STAGE_SAMPLES.get(stage.name)
    if _SEARCH.value:
        tried = search.search(config, stage, topology, tuple(POLICIES), _LATENTS.value)
        print(search.ranking(tried))
        best = tried[0]
    else:
        best = report.analyse(program.compile_step(config, stage, topology, _LATENTS.value), topology)
    print(report.table(best, samples))
    print(json.dumps(report.line(best, samples)))


if __name__ == "__main__":
    run_main(main)
