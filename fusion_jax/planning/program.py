"""Compiles the real train step of a stage for chips that need not be here."""

import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusion_jax.config import MeshConfig, RunConfig, StageConfig
from fusion_jax.devices import sharding
from fusion_jax.devices.chips import Topology
from fusion_jax.errors import check, check_choice
from fusion_jax.models.fusion import Fusion
from fusion_jax.planning import compiling, typical
from fusion_jax.planning.typical import TypicalStep
from fusion_jax.training import optim, state
from fusion_jax.training.step import compile_step as compile_train_step


@dataclass(frozen=True)
class Program:
    """A compiled train step and what it was compiled for.

    Attributes:
      text: its optimized HLO; empty if it does not fit. needed, limit: bytes of HBM that it takes on a chip and that a
        chip has, according to the compiler; if the arguments alone do not fit, nothing was compiled and `needed` is
        what they take.
      parameters, optimizer, batch: bytes of its arguments on a chip. temporaries: bytes beyond them.
      parameter_count: that of the model. compiled: whether it was compiled. seconds: the time that this took.
    """

    config: RunConfig
    stage: StageConfig
    mesh: Mesh
    step: TypicalStep
    text: str
    needed: float
    limit: float
    parameters: float
    optimizer: float
    batch: float
    parameter_count: int
    compiled: bool
    seconds: float

    @property
    def fits(self) -> bool:
        return bool(self.text)

    @property
    def temporaries(self) -> float:
        return self.needed - self.parameters - self.optimizer - self.batch


def find_stage(config: RunConfig, name: str) -> StageConfig:
    """Returns the config's stage of that name, or its first if the name is empty. Raises UserError if there is none."""
    matches = [stage for stage in config.stages if name in ("", stage.name)]
    if not matches:
        check_choice("--stage=", name, [stage.name for stage in config.stages])
    return matches[0]


def parse_mesh(text: str, config: MeshConfig) -> MeshConfig:
    """Reads a mesh such as `fsdp=64,tensor=2`, where axes that are not named have size 1; empty text is the config's.

    Raises:
      UserError: the text cannot be read, or names another axis.
    """
    if not text:
        return config
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        check(
            name in sharding.AXES and re.fullmatch(r"-1|\d+", size) is not None,
            f"--mesh={text}: {part!r} is not one of {', '.join(f'{axis}=N' for axis in sharding.AXES)}.",
        )
        sizes[name] = int(size)
    return MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes)


def bytes_per_chip(tree) -> int:
    """Returns the bytes that one device holds of a tree of arrays with shardings, which may be abstract."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def prepare(
    config: RunConfig, stage: StageConfig, topology: Topology, latent_count: int | None = None, largest: bool = False
):
    """Checks everything that can be wrong before anything is compiled, and builds the step to compile.

    Returns:
      (mesh, typical step).

    Raises:
      UserError: the mesh does not divide the chips, the model or the batch.
    """
    sizes = sharding.mesh_sizes(config.mesh, topology.chips)
    typical_step = typical.step(config, stage, sizes[0] * sizes[1], latent_count, largest)
    mesh = sharding.make_mesh(config.mesh, topology.devices())
    sharding.check_model(config.model, mesh)
    return mesh, typical_step


def abstract_arguments(config: RunConfig, stage: StageConfig, mesh: Mesh, step: TypicalStep):
    """Returns (optimizer, labels, arguments of the train step as shapes with shardings)."""
    params = state.with_masters(state.abstract_parameters(config.model, mesh), stage.master_weights)
    tx, labels = optim.optimizer(stage, params), optim.labels(stage, params)
    rows, everywhere = sharding.of_rows(mesh), sharding.replicated(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), step.batch)
    rates = optim.learning_rates(stage, 0, 1)
    rates = {label: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) for label in rates}
    return tx, labels, (state.abstract(params, tx, mesh), batch, rates)


def compile_step(
    config: RunConfig, stage: StageConfig, topology: Topology, latent_count: int | None = None, largest: bool = False
) -> Program:
    """Compiles a stage's train step, by default at the largest l^2; `latent_count`, `largest`: see `typical.step`.

    Raises:
      UserError: as for `prepare`.
    """
    mesh, step = prepare(config, stage, topology, latent_count, largest)
    tx, labels, arguments = abstract_arguments(config, stage, mesh, step)
    model = Fusion(config.model, jnp.dtype(config.dtype), config.remat)
    old, batch, _ = arguments
    start = time.perf_counter()
    needed, limit, text = bytes_per_chip((old, batch)), topology.limit or topology.chip.hbm, ""
    may_fit = topology.limit is None or needed <= topology.limit
    if may_fit:
        lowered = compile_train_step(model, stage, tx, labels, mesh).lower(*arguments)
        try:
            compiled = compiling.compiled(lowered, f"{stage.name} for {topology.name}", topology.options)
        except jax.errors.JaxRuntimeError as error:
            needed, limit = _too_large(str(error))
            if not needed:
                raise
        else:
            needed = _memory(compiled.memory_analysis(), mesh)
            text = compiled.as_text() if topology.limit is None or needed <= topology.limit else ""
    seconds = time.perf_counter() - start
    return Program(
        config=config,
        stage=stage,
        mesh=mesh,
        step=step,
        text=text,
        needed=needed,
        limit=limit,
        parameters=bytes_per_chip(old.params),
        optimizer=bytes_per_chip(old.opt_state),
        batch=bytes_per_chip(batch),
        parameter_count=sum(int(np.prod(x.shape)) for x in jax.tree.leaves(old.params)),
        compiled=may_fit,
        seconds=seconds,
    )


def _memory(analysis, mesh: Mesh) -> float:
    """Returns the bytes that a compiled program takes on a chip, from XLA's memory analysis of it."""
    if mesh.devices.flat[0].platform == "tpu":
        # Its `temp_size_in_bytes` counts gaps between buffers twice: up to 10 GiB more than the chip needs.
        return analysis.peak_memory_in_bytes + analysis.generated_code_size_in_bytes
    # A GPU's temporaries are one allocation, gaps included.
    own = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + own + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes


def _too_large(message: str) -> tuple[float, float]:
    """Reads (bytes needed, bytes available) from the compiler's error for a program that does not fit; else (0, 0)."""
    size = r"([\d.]+) ?([KMGT]?)(?:i?B)?"
    sizes = re.search(f"Used {size} of {size} hbm", message)
    sizes = sizes or re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if not sizes:
        return 0.0, 0.0
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(sizes[1]) * units[sizes[2]], float(sizes[3]) * units[sizes[4]]
