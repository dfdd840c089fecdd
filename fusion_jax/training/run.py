"""Trains a run: all stages of a config, one after the other, in one workdir."""

import contextlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fusion_jax.config import RunConfig, to_dict
from fusion_jax.devices import distributed
from fusion_jax.errors import RunAgain
from fusion_jax.files import write_whole
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import checks, init_from, lock, state
from fusion_jax.training.about import describe_run
from fusion_jax.training.compilation_cache import keep_programs
from fusion_jax.training.plots import plot_losses
from fusion_jax.training.stage import explain_start_errors, train_stage
from fusion_jax.training.stopping import Stop

log = logging.getLogger("fusion_jax")


def train(
    config: RunConfig,
    workdir: Path,
    stop: Stop | None = None,
    profile: tuple[int, int] | None = None,
    accepted: Sequence[str] = (),
) -> None:
    """Trains, or continues, all stages of a config in `workdir`.

    Args:
      stop: checked after every step. profile: (first, last) step to trace, in each stage. accepted: `resume.INPUTS`
        that may differ from those of the checkpoint.

    Raises:
      UserError: anything that the person at the terminal can put right.
      RunAgain: the run was stopped on request; the same call continues it.
    """
    stop = stop or Stop()
    with explain_start_errors(workdir):
        # ---- Inputs: everything that can be wrong is checked before any long work.
        inputs = checks.open_inputs(config, workdir, accepted)
        config = inputs.config
        workdir.mkdir(parents=True, exist_ok=True)
    # With several processes, one of them holds the lock for all.
    with lock.hold(workdir) if distributed.is_first() else contextlib.nullcontext():
        keep_programs(workdir / "compiled", distributed.is_first())
        with explain_start_errors(workdir):
            if distributed.is_first():
                write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2))
            about = describe_run(config, inputs.tokenizer, inputs.origin, inputs.data)

        # ---- Model.
        model = Fusion(config.model, jnp.dtype(config.dtype), config.remat)
        params = state.abstract_parameters(config.model, inputs.mesh)
        _log_model(config, params, inputs.mesh)
        if not inputs.begun:  # otherwise the stage restores them
            params = _initial_parameters(config, params, inputs.mesh)

        # ---- Stages.
        for stage in config.stages[inputs.first :]:
            if stop.requested:
                raise RunAgain(f"stopped before {stage.name}; start again to go on.")
            params = train_stage(inputs, stage, workdir, about, model, params, stop, profile)
        if distributed.is_first():
            _plot(config, workdir)


def _log_model(config: RunConfig, params: dict, mesh: Mesh) -> None:
    log.info(
        "%s parameters, %d device(s) of kind %s (%s) in %d process(es), compute in %s",
        f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}",
        jax.device_count(),
        jax.devices()[0].device_kind,
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        jax.process_count(),
        config.dtype,
    )


def _initial_parameters(config: RunConfig, like: dict, mesh: Mesh) -> dict:
    """Returns the parameters of `config.init_from` with the shapes, dtypes and shardings of `like`, or random ones."""
    if not config.init_from:
        return state.initial_parameters(config.model, config.seed, mesh)
    folder, params = init_from.initial_parameters(config, like)
    log.info("parameters from %s", folder)
    return params


def _plot(config: RunConfig, workdir: Path) -> None:
    files = {stage.name: workdir / stage.name / "metrics.jsonl" for stage in config.stages}
    try:
        plot_losses({name: path for name, path in files.items() if path.exists()}, workdir / "losses.png")
        log.info("done; loss curves in %s", workdir / "losses.png")
    except Exception as error:
        log.warning("done; no loss curves: %s: %s", type(error).__name__, error)
