"""Analyses what a step of a compiled program needs and how fast it can be: a table and a JSON line."""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from fusion_jax.devices import flops, sharding
from fusion_jax.devices.chips import Topology
from fusion_jax.planning import kernels, typical
from fusion_jax.planning.program import Program
from fusion_jax.planning.work import read
from fusion_jax.training import losses

# Published samples of each stage, in millions.
STAGE_SAMPLES = {"stage1": 10e6, "stage1_5": 5e6, "stage2": 7e6}
GIB = 2**30


@dataclass(frozen=True)
class Report:
    """What a step needs.

    Attributes:
      average: what steps of the stage have on average over l^2 and the sizes of steps. model_flops, compiled_flops:
      FLOPs of all chips that the model needs and that the program computes. kernels: the latter by kind of kernel.
      hbm_bytes: those of one chip. collectives: bytes that one chip sends, by (kind, mesh axes). exposed,
      exposed_seconds: the bytes of those beside which the program runs no product, and their least time. seconds:
      lower bounds by cause, each for that alone.
    """

    topology: Topology
    program: Program
    average: typical.Average
    model_flops: float
    compiled_flops: float = math.nan
    kernels: dict[str, float] = field(default_factory=dict)
    hbm_bytes: float = math.nan
    collectives: dict[tuple[str, str], float] = field(default_factory=dict)
    exposed: float = math.nan
    exposed_seconds: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values(), default=math.nan)

    @property
    def bound_by(self) -> str | None:
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.step_seconds * self.topology.chips * self.topology.chip.peak)

    @property
    def samples_per_second(self) -> float:
        return self.average.samples / self.step_seconds

    def chip_hours(self, stage_samples: float) -> float:
        return stage_samples / self.samples_per_second * self.topology.chips / 3600


def axes_of(groups, mesh: Mesh) -> str:
    """Returns the mesh axes along which the members of a collective's groups differ, such as `fsdp` or `data+fsdp`."""
    places = np.array([np.unravel_index(device, mesh.devices.shape) for device in groups[0]])
    varying = [axis for axis, column in zip(sharding.AXES, places.T) if len(set(column.tolist())) > 1]
    return "+".join(varying) or "none"


def analyse(program: Program, topology: Topology) -> Report:
    """Counts a program's work, and divides it by the chip's rates to bound the time of a step."""
    config, stage, step, chip = program.config, program.stage, program.step, topology.chip
    model_flops = flops.step_flops(config.model, step.shape)
    shards = sharding.batch_shards(program.mesh)
    average = typical.average(config, stage, shards)
    if not program.text:
        return Report(topology, program, average, model_flops)
    # The only loop whose trip count depends on its data is the cross-entropy's over supervised positions.
    chunks = math.ceil(step.shape.supervised / shards / stage.accumulation / losses.CHUNK)
    work = read(program.text, topology.chips, chunks)
    packed = functools.partial(kernels.packed_share, step.shape.lengths, *step.batch.tokens.shape)
    by_kind = defaultdict(float)
    for kernel in work.kernels:
        by_kind[kernels.kind(kernel)] += kernels.flops(kernel, packed) * kernel.times
    compiled = work.flops + sum(by_kind.values())
    devices = program.mesh.devices.reshape(-1)
    sums: dict[tuple[str, str], float] = defaultdict(float)
    network = exposed = exposed_seconds = 0.0
    for one in work.collectives:
        if len(one.groups[0]) == 1:
            continue
        sums[one.kind, axes_of(one.groups, program.mesh)] += one.bytes * one.times
        groups = [[devices[i] for i in group] for group in one.groups]
        seconds = max(topology.seconds(one.kind, one.bytes, group) for group in groups) * one.times
        network += seconds
        if one.exposed:
            exposed += one.bytes * one.times
            exposed_seconds += seconds
    return Report(
        topology=topology,
        program=program,
        average=average,
        model_flops=model_flops,
        compiled_flops=compiled * topology.chips,
        kernels={name: count * topology.chips for name, count in {"generated products": work.flops, **by_kind}.items()},
        hbm_bytes=work.hbm_bytes,
        collectives=dict(sums),
        exposed=exposed,
        exposed_seconds=exposed_seconds,
        seconds={
            "compute": compiled / chip.peak,
            "hbm": work.hbm_bytes / chip.hbm_rate,
            "interconnect": network,
        },
    )


def _number(value: float, digits: int = 4) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def line(report: Report, stage_samples: float | None) -> dict:
    """Returns the JSON line of a report; docs/scaling.md describes its keys."""
    program = report.program
    chip_hours = report.chip_hours(stage_samples) if stage_samples else math.nan
    return {
        "fits": program.fits,
        "hbm_gib_per_chip": _number(program.needed / GIB),
        "compiled_over_model_flops": _number(report.compiled_flops / report.model_flops),
        "padded_over_model_flops": _number(report.average.padded),
        "collective_gib_per_chip_step": _number(sum(report.collectives.values()) / GIB if program.fits else math.nan),
        "exposed_collective_gib": _number(report.exposed / GIB),
        "exposed_collective_seconds": _number(report.exposed_seconds),
        "step_seconds_bound": _number(report.step_seconds),
        "mfu_bound": _number(report.mfu),
        "bound_by": report.bound_by,
        "samples_per_second": _number(report.samples_per_second),
        "chip_hours": _number(chip_hours),
        "flops_by_kernel": {kind: _number(count) for kind, count in report.kernels.items() if count},
        "compile_seconds": _number(program.seconds if program.compiled else math.nan, 3),
    }


def _sizes(average: typical.Average) -> list[str]:
    """Formats the sizes of the stage's steps, if there are several, and what padding costs on average."""
    lines = [f"  padded over model      {average.padded:.3f} of the FLOPs, on average over all steps"]
    if len(average.sizes) > 1:
        for length, fewest, most, share in average.sizes:
            rounds = str(fewest) if fewest == most else f"{fewest} to {most}"
            lines.append(
                f"    {share:>4.0%} of the steps     questions of up to {length} tokens, {rounds} rounds a row"
            )
    return lines


def table(report: Report, stage_samples: float | None) -> str:
    """Formats the report for reading, with what its figures consist of."""
    program, step, topology = report.program, report.program.step, report.topology
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    noun, plural = topology.noun, topology.noun + "s" * (topology.chips > 1)
    (rows, length), (groups, crops) = step.batch.tokens.shape, step.batch.crop_kind.shape
    out = [
        f"{program.stage.name} on {topology.name}, {topology.chips} {plural} ({mesh}), remat {program.config.remat}",
        f"  parameters             {program.parameter_count / 1e9:.2f} B",
        f"  step                   {rows} rows of {length}, {groups} groups of {crops} crops, "
        f"l^2 = {step.batch.latent_count}, {program.stage.accumulation} microbatch(es)",
        f"  samples in a step      {step.samples} at this l^2, {report.average.samples:.0f} on average",
        *_sizes(report.average),
        f"  positions in use       {step.tokens / step.batch.tokens.size:.1%} of the rows, "
        f"{len(step.shape.crops) / max(step.batch.crop_kind.size, 1):.1%} of the crops",
        f"HBM of a {noun}, GiB",
        f"  parameters             {program.parameters / GIB:.2f}",
        f"  optimizer              {program.optimizer / GIB:.2f}",
        f"  batch                  {program.batch / GIB:.2f}",
        "  activations and others "
        + (f"{program.temporaries / GIB:.2f}" if program.compiled else "not compiled, since these alone are too much"),
        f"  in all                 {program.needed / GIB:.2f} of {program.limit / GIB:.2f}{topology.memory_note}: "
        + ("fits" if program.fits else "DOES NOT FIT"),
    ]
    if not program.fits:
        return "\n".join(out)
    out += [
        "FLOPs of a step",
        f"  model                  {report.model_flops:.4g}",
        f"  compiled               {report.compiled_flops:.4g}",
        *(f"    {name:<20} {count:.4g}" for name, count in report.kernels.items() if count),
        f"  compiled over model    {report.compiled_flops / report.model_flops:.3f}",
        f"Collectives, GiB that a {noun} sends in a step",
    ]
    for (kind, axes), size in sorted(report.collectives.items(), key=lambda item: -item[1]):
        out.append(f"  {kind:<22} {axes:<16} {size / GIB:.3f}")
    out.append(f"  in all                 {'':<16} {sum(report.collectives.values()) / GIB:.3f}")
    out.append(f"  beside no product      {'':<16} {report.exposed / GIB:.3f}, at least {report.exposed_seconds:.4f} s")
    out.append("Lower bounds of a step, seconds (each as if the others took no time)")
    for name, seconds in report.seconds.items():
        out.append(f"  {name:<22} {seconds:.4f}")
    out += [
        f"  step                   {report.step_seconds:.4f}, bound by {report.bound_by}",
        f"  MFU                    at most {report.mfu:.1%}",
        f"  samples a second       at most {report.samples_per_second:.1f} "
        f"({step.tokens / report.step_seconds:,.0f} tokens of the LLM)",
    ]
    if stage_samples:
        hours = report.chip_hours(stage_samples)
        out.append(
            f"  {stage_samples / 1e6:g}M samples            at least {hours:,.0f} {noun}-hours, "
            f"{hours / topology.chips:.1f} h"
        )
    out.append(f"compiled in {program.seconds:.0f} s")
    return "\n".join(out)
