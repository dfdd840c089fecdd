"""Searches for the mesh, remat policy, gathering and batch size that suit a topology, compiling one by one."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

from fusion_jax.config import GATHERS, MeshConfig, RunConfig, StageConfig
from fusion_jax.devices import sharding
from fusion_jax.devices.chips import Topology
from fusion_jax.errors import UserError
from fusion_jax.planning import program, report
from fusion_jax.planning.report import Report

log = logging.getLogger("fusion_jax")

_CHEAPEST_FIRST = ("none", "dots", "attention", "full")  # by how much is recomputed


def meshes(chips: int, slices: int) -> Iterator[MeshConfig]:
    """Yields meshes to try: parameters sharded over a slice, with a few copies of them, or with tensor parallelism."""
    per_slice = chips // slices
    for copies, tensor in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4)):
        if per_slice % (copies * tensor) == 0 and per_slice > copies * tensor:
            yield MeshConfig(slices * copies, per_slice // copies // tensor, tensor)


def search(
    config: RunConfig,
    stage: StageConfig,
    topology: Topology,
    policies: Sequence[str],
    latent_count: int | None = None,
) -> list[Report]:
    """Reports on everything that was tried, the best first: what fits before what does not, by samples per second.

    It tries the remat policies first, from the one that recomputes least until one fits; with that policy the meshes;
    with the best mesh the other way to gather weights; and with the better of these twice and half the batch.

    Raises:
      UserError: nothing could be compiled at all.
    """
    tried: list[Report] = []

    def attempt(config: RunConfig, stage: StageConfig) -> Report | None:
        try:
            program.prepare(config, stage, topology, latent_count)
        except UserError as error:
            log.info("left out: %s", error)
            return None
        analysed = report.analyse(program.compile_step(config, stage, topology, latent_count), topology)
        tried.append(analysed)
        log.info("%s", summary(analysed))
        return analysed

    for policy in sorted(policies, key=_CHEAPEST_FIRST.index):
        attempted = attempt(dataclasses.replace(config, remat=policy), stage)
        if attempted and attempted.program.fits:
            break
    if not tried:
        raise UserError(
            "--search: the config's mesh does not divide the chips, the model or the batch; give another --mesh."
        )
    chosen = dataclasses.replace(config, remat=best(tried).program.config.remat)
    first = tuple(tried[0].program.mesh.shape.values())
    for mesh in meshes(topology.chips, topology.slices):
        if dataclasses.astuple(mesh) != first:
            attempt(dataclasses.replace(chosen, mesh=mesh), stage)
    chosen = best(tried).program.config
    if best(tried).program.mesh.shape[sharding.FSDP] > 1:
        for gather in GATHERS:
            if gather != stage.gather:
                attempt(chosen, dataclasses.replace(stage, gather=gather))
    stage = best(tried).program.stage
    for batch_size in (stage.batch_size * 2, stage.batch_size // 2):
        if batch_size % stage.accumulation == 0 and batch_size:
            attempt(chosen, dataclasses.replace(stage, batch_size=batch_size))
    return sorted(tried, key=_merit, reverse=True)


def _merit(tried: Report) -> tuple[bool, float]:
    return (True, tried.samples_per_second) if tried.program.fits else (False, -tried.program.needed)


def best(tried: Sequence[Report]) -> Report:
    """Returns the report that fits with most samples per second, or the smallest if none fits."""
    return max(tried, key=_merit)


def summary(tried: Report) -> str:
    """Formats one line of the ranking."""
    p = tried.program
    mesh = ",".join(f"{axis}={size}" for axis, size in p.mesh.shape.items() if size > 1)
    options = f"remat={p.config.remat} gather={p.stage.gather} batch={p.stage.batch_size}"
    about = f"{mesh} {options}: {p.needed / report.GIB:.1f} GiB"
    if not p.fits:
        return f"{about} {'' if p.compiled else 'and more '}of {p.limit / report.GIB:.1f}, does not fit"
    return f"{about}, {tried.samples_per_second:.1f} samples/s and {tried.mfu:.1%} MFU at most ({tried.bound_by})"


def ranking(tried: Sequence[Report]) -> str:
    """Formats all reports for reading, one per line."""
    return "\n".join(["Tried, the best first:", *(f"  {summary(one)}" for one in tried)])
