"""From a compiled program to what it needs and what it may reach: the bounds, the table, the JSON line."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from fusion_jax import flops, losses, sharding
from fusion_jax.models import flash
from fusion_jax.planning import hlo, typical
from fusion_jax.planning.chips import Topology
from fusion_jax.planning.program import Program

# Published samples of each stage, in millions.
STAGE_SAMPLES = {"stage1": 10e6, "stage1_5": 5e6, "stage2": 7e6}
GIB = 2**30

# Products of a splash attention kernel, each 2 Sq Sk d FLOPs a head, by what its name holds: scores and output;
# scores, d(weights), d(query); scores, d(weights), d(key), d(value).
_SPLASH = (("_dkv", 4), ("_dq", 3), ("_fwd", 2))


@dataclass(frozen=True)
class Report:
    """Of a step. FLOPs are of all chips, bytes of one; `collectives` by (kind, mesh axes); seconds are lower bounds."""

    topology: Topology
    program: Program
    samples: float
    model_flops: float
    compiled_flops: float = math.nan
    kernel_flops: float = math.nan
    hbm_bytes: float = math.nan
    collectives: dict[tuple[str, str], float] = field(default_factory=dict)
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
        return self.samples / self.step_seconds

    def chip_hours(self, stage_samples: float) -> float:
        return stage_samples / self.samples_per_second * self.topology.chips / 3600


def splash_flops(kernel: hlo.Kernel) -> float:
    """FLOPs of one call of a splash attention kernel; blocks that the causal mask hides are never computed.

    Its first three operands of several dimensions are the query, key and value: (..., heads, length, head size).
    """
    products = next((count for part, count in _SPLASH if part in kernel.name), 0)
    arrays = [s.dims for s in kernel.operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f32")]
    if not products or len(arrays) < 3:
        raise ValueError(f"unknown Pallas kernel {kernel.name}: its FLOPs cannot be counted.")
    query, key = arrays[0], arrays[1]
    length = query[-2]
    blocks = length // flash._blocks(length)[1]
    # The decoder is causal, the encoder is not.
    share = (blocks + 1) / (2 * blocks) if "/llm/" in kernel.name else 1.0
    return products * 2.0 * math.prod(query) * key[-2] * share


def axes_of(groups, mesh: Mesh) -> str:
    """Mesh axes along which the members of a collective's groups differ: `fsdp`, `data+fsdp`, ..."""
    places = np.array([np.unravel_index(device, mesh.devices.shape) for device in groups[0]])
    varying = [axis for axis, column in zip(sharding.AXES, places.T) if len(set(column.tolist())) > 1]
    return "+".join(varying) or "none"


def analyse(program: Program, topology: Topology) -> Report:
    """Counts a program's work and divides it by the chip's rates."""
    config, stage, step, chip = program.config, program.stage, program.step, topology.chip
    model_flops = flops.step_flops(config.model, step.shape)
    shards = sharding.batch_shards(program.mesh)
    samples = typical.mean_samples(config, stage, shards)
    if not program.text:
        return Report(topology, program, samples, model_flops)
    # The only loop whose rounds its data decides is the cross-entropy's over supervised positions.
    chunks = math.ceil(step.shape.supervised / shards / stage.accumulation / losses.CHUNK)
    work = hlo.read(program.text, topology.chips, chunks)
    kernels = sum(splash_flops(kernel) * kernel.times for kernel in work.kernels)
    devices = program.mesh.devices.reshape(-1)
    sums: dict[tuple[str, str], float] = defaultdict(float)
    network = 0.0
    for one in work.collectives:
        if len(one.groups[0]) == 1:
            continue
        sums[one.kind, axes_of(one.groups, program.mesh)] += one.bytes * one.times
        network += topology.seconds(one.kind, one.bytes, [devices[i] for i in one.groups[0]]) * one.times
    compiled = (work.flops + kernels) * topology.chips
    in_kernels = sum(sum(s.bytes for s in k.operands + k.results) * k.times for k in work.kernels)
    return Report(
        topology=topology,
        program=program,
        samples=samples,
        model_flops=model_flops,
        compiled_flops=compiled,
        kernel_flops=kernels * topology.chips,
        hbm_bytes=work.hbm_bytes + in_kernels,
        collectives=dict(sums),
        seconds={
            "compute": compiled / topology.chips / chip.peak,
            "hbm": (work.hbm_bytes + in_kernels) / chip.hbm_rate,
            "interconnect": network,
        },
    )


def _number(value: float, digits: int = 4) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def line(report: Report, stage_samples: float | None) -> dict:
    """The JSON line: see docs/scaling.md."""
    program = report.program
    chip_hours = report.chip_hours(stage_samples) if stage_samples else math.nan
    return {
        "fits": program.fits,
        "hbm_gib_per_chip": _number(program.needed / GIB),
        "compiled_over_model_flops": _number(report.compiled_flops / report.model_flops),
        "collective_gib_per_chip_step": _number(sum(report.collectives.values()) / GIB if program.fits else math.nan),
        "step_seconds_bound": _number(report.step_seconds),
        "mfu_bound": _number(report.mfu),
        "bound_by": report.bound_by,
        "samples_per_second": _number(report.samples_per_second),
        "chip_hours": _number(chip_hours),
        "compile_seconds": _number(program.seconds, 3),
    }


def table(report: Report, stage_samples: float | None) -> str:
    """The same and where it comes from, for reading."""
    program, step, topology = report.program, report.program.step, report.topology
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    (rows, length), (groups, crops) = step.batch.tokens.shape, step.batch.crop_kind.shape
    out = [
        f"{program.stage.name} on {topology.name}, {topology.chips} chips ({mesh}), remat {program.config.remat}",
        f"  parameters             {program.parameter_count / 1e9:.2f} B",
        f"  step                   {rows} rows of {length}, {groups} groups of {crops} crops, "
        f"l^2 = {step.batch.latent_count}, {program.stage.accumulation} microbatch(es)",
        f"  samples in a step      {step.samples} at this l^2, {report.samples:.0f} on average",
        f"  positions in use       {step.tokens / step.batch.tokens.size:.1%} of the rows, "
        f"{len(step.shape.crops) / max(step.batch.crop_kind.size, 1):.1%} of the crops",
        "HBM of a chip, GiB",
        f"  parameters             {program.parameters / GIB:.2f}",
        f"  optimizer              {program.optimizer / GIB:.2f}",
        f"  batch                  {program.batch / GIB:.2f}",
        f"  activations and others {program.temporaries / GIB:.2f}",
        f"  in all                 {program.needed / GIB:.2f} of {program.limit / GIB:.2f}: "
        + ("fits" if program.fits else "DOES NOT FIT"),
    ]
    if not program.fits:
        return "\n".join(out)
    out += [
        "FLOPs of a step",
        f"  model                  {report.model_flops:.4g}",
        f"  compiled               {report.compiled_flops:.4g}, of them in Pallas kernels {report.kernel_flops:.3g}",
        f"  compiled over model    {report.compiled_flops / report.model_flops:.3f}",
        "Collectives, GiB that a chip sends in a step",
    ]
    for (kind, axes), size in sorted(report.collectives.items(), key=lambda item: -item[1]):
        out.append(f"  {kind:<22} {axes:<16} {size / GIB:.3f}")
    out.append(f"  in all                 {'':<16} {sum(report.collectives.values()) / GIB:.3f}")
    out.append("Lower bounds of a step, seconds (each as if the others took no time)")
    for name, seconds in report.seconds.items():
        out.append(f"  {name:<22} {seconds:.4f}")
    tokens = report.step_seconds
    out += [
        f"  step                   {report.step_seconds:.4f}, bound by {report.bound_by}",
        f"  MFU                    at most {report.mfu:.1%}",
        f"  samples a second       at most {report.samples_per_second:.1f} "
        f"({step.tokens / tokens:,.0f} tokens of the LLM)",
    ]
    if stage_samples:
        hours = report.chip_hours(stage_samples)
        out.append(
            f"  {stage_samples / 1e6:g}M samples            at least {hours:,.0f} chip-hours, "
            f"{hours / topology.chips:.1f} h"
        )
    out.append(f"compiled in {program.seconds:.0f} s")
    return "\n".join(out)
