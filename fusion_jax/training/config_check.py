"""Checks a run configuration for the doctor: what training would refuse, and whether its state fits."""

import functools
import logging
import os
import tempfile
from pathlib import Path

from fusion_jax.command_line.interrupts import loading
from fusion_jax.devices.device_check import GIB, Fact, Findings, Problem
from fusion_jax.devices.machine_check import check_disk, memory
from fusion_jax.errors import UserError


def count_parameters(config) -> tuple[int, int]:
    """Returns the number of parameters, and of those trained in the stage that trains most; nothing is allocated."""
    with loading():
        import jax

        from fusion_jax.models import fusion
        from fusion_jax.training import optim

    params = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    sizes = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.size, params))
    trained = [
        sum(
            n
            for n, label in zip(sizes, jax.tree.leaves(optim.labels(stage, params)))
            if label not in (optim.FROZEN, optim.ROWS)
        )
        for stage in config.stages
    ]
    return sum(sizes), max(trained)


def state_bytes(config) -> int:
    """Returns the bytes of the training state, in memory and in a checkpoint, in the stage where it takes most."""
    with loading():
        import jax

        from fusion_jax.training import optim, state

    def of(stage) -> int:
        params = state.with_masters(state.shapes(config.model), stage.master_weights)
        whole = jax.eval_shape(functools.partial(state.create, tx=optim.optimizer(stage, params)), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))

    return max(map(of, config.stages))


def check_inputs(config, workdir: str | None, accepted, devices: int) -> Findings:
    """Runs the checks with which training begins (`checks.open_inputs`), and yields all their errors and warnings.

    Args:
      config: RunConfig. accepted: what may have changed, see `--accept_changed`. devices: how many there are, 0 if
        that is unknown.
    """
    with loading():
        from fusion_jax.training import checks

    problems, warnings = [], []
    log, handler = logging.getLogger("fusion_jax"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    printed, log.handlers = log.handlers, [handler]
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            checks.open_inputs(config, Path(workdir or nowhere), accepted, problems, devices)
    except OSError as error:
        problems.append(UserError(f"{error.filename or workdir} cannot be used ({error.strerror or error})."))
    finally:
        log.handlers = printed
    for problem in dict.fromkeys(map(str, problems)):
        yield Problem(True, problem, "Training would end with this sentence.")
    for warning in dict.fromkeys(warnings):
        yield Problem(False, warning, "Training would say so and go on.")


def check_config(config, answer: dict | Problem, workdir: str | None, accepted=()) -> Findings:
    """Checks a RunConfig against this machine.

    Args:
      answer: what `ask_devices` returned. accepted: see `check_inputs`.
    """
    known = isinstance(answer, dict)
    if not known:  # what broke the devices' process must not break this one
        os.environ.pop("XLA_FLAGS", None)
    with loading():
        import jax

        jax.config.update("jax_platforms", "cpu")  # this process must not take the accelerator just for this
    yield from check_inputs(config, workdir, accepted, answer["count"] if known else 0)
    if not known:
        yield from check_disk(workdir)
        return
    total, trained = count_parameters(config)
    yield Fact("config", "parameters", f"{total:,}, {trained:,} of them trained")
    state = state_bytes(config)
    yield Fact("config", "state", f"{state / GIB:.1f} GiB over all devices; gradients and activations come on top")
    hbm = answer["devices"][0]["memory"] * answer["count"] or memory()[0]
    if state > hbm:
        yield Problem(
            True,
            f"Weights and optimizer take {state / GIB:.1f} GiB; all devices have {hbm / GIB:.1f} GiB.",
            "Use more devices, freeze parts (config.stages[i].freeze), or store the state in fewer bits (first_moment, "
            "second_moment and master_weights of config.stages[i]).",
        )
    yield from check_disk(workdir, state, config.keep_checkpoints)
