"""Planning: counting work in HLO by hand-checked programs on 8 CPU devices, typical steps, refusals, one whole plan."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import flare, fusion
from fusion_jax import flops
from fusion_jax.config import MeshConfig, RunConfig, from_dict
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.data.pipeline import layout_spec
from fusion_jax.errors import UserError
from fusion_jax.models.config import replace
from fusion_jax.planning import hlo, program, report, typical
from fusion_jax.planning.chips import topology
from fusion_jax.planning.tpus import CHIPS, KNOWN

DEVICES = 8


# Where axes (data 2, fsdp 4, tensor 1) are of a mesh of 8 devices counted up; no device is needed for their names.
MESH = SimpleNamespace(devices=np.arange(DEVICES).reshape(2, 4, 1))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Optimized HLO of small programs; devices are counted once in a process, so another one compiles them."""
    worker = Path(__file__).parent / "plan_programs.py"
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Counting.


def test_scan_of_gathered_layers_is_counted_by_its_trips(texts):
    """5 layers of (64, 64) dealt over fsdp, 16 rows over all 8 devices: 2 rows each."""
    work = hlo.read(texts["layers"], DEVICES)
    assert work.flops == 5 * 3 * 2 * 2 * 64 * 64  # forward, by x, by w
    [gather] = [c for c in work.collectives if c.kind == "all-gather"]
    assert gather.times == 5
    assert gather.bytes == 64 * 64 * 4 * 3 / 4  # three of four parts come from others
    assert report.axes_of(gather.groups, MESH) == "fsdp"
    reduced = [c for c in work.collectives if c.kind == "all-reduce"]
    assert sum(c.times * c.bytes for c in reduced) == 5 * 2 * 64 * 64 * 4 * 7 / 8
    assert {report.axes_of(c.groups, MESH) for c in reduced} == {"data+fsdp"}


def test_loop_whose_rounds_the_data_decides_takes_the_given_number(texts):
    assert hlo.read(texts["loop"], 1, 7).flops == 7 * 2 * 32**3


def test_batched_products_and_nested_scans_are_counted(texts):
    assert hlo.read(texts["nested"], 1).flops == 4 * 3 * 6 * 2 * 40**3


@pytest.mark.parametrize("axes, members", [("data", 2), ("fsdp", 4), ("data+fsdp", 8)])
def test_collectives_are_told_apart_by_mesh_axis(texts, axes, members):
    [one] = hlo.read(texts[axes], DEVICES).collectives
    assert (one.kind, report.axes_of(one.groups, MESH)) == ("all-reduce", axes)
    assert one.bytes == 2 * 128 * 4 * (members - 1) / members


def test_loops_without_a_written_count_are_read_from_their_condition(texts):
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", texts["nested"])
    assert text != texts["nested"]
    assert hlo.read(text, 1).flops == 4 * 3 * 6 * 2 * 40**3


def test_collective_spread_over_fusions_counts_once():
    work = hlo.read(SPREAD_TEXT, 4)
    [one] = work.collectives
    assert (one.kind, one.bytes, one.groups) == ("all-gather", 3 * 8 * 16 * 2, ((0, 1, 2, 3),))


SPREAD_TEXT = """HloModule jit_step, is_scheduled=true

%start (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %g = bf16[32,16]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%done (p.1: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: bf16[8,16]) -> bf16[32,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %f = bf16[32,16]{1,0} fusion(%a), kind=kOutput, calls=%start
  ROOT %f.1 = bf16[32,16]{1,0} fusion(%a), kind=kOutput, calls=%done, frontend_attributes={kernel_metadata={
"of": "a kernel"
}}
}
"""


def test_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    [one] = hlo.read(SCATTER_TEXT, 4).collectives
    assert (one.kind, one.bytes) == ("reduce-scatter", 3 / 4 * 32 * 16 * 2)
    whole = SCATTER_TEXT.replace("ROOT %s = bf16[8,16]{1,0} dynamic-slice", "ROOT %s = bf16[8,16]{1,0} slice")
    [one] = hlo.read(whole, 4).collectives
    assert (one.kind, one.bytes) == ("all-reduce", 2 * 3 / 4 * 32 * 16 * 2)


SCATTER_TEXT = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (p: bf16[32,16]) -> bf16[8,16] {
  %p = bf16[32,16]{1,0} parameter(0)
  %r = bf16[32,16]{1,0} all-reduce(%p), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  %i = u32[] partition-id()
  %c = u32[] constant(0)
  ROOT %s = bf16[8,16]{1,0} dynamic-slice(%r, %i, %c), dynamic_slice_sizes={8,16}
}

ENTRY %main (a: bf16[32,16]) -> bf16[8,16] {
  %a = bf16[32,16]{1,0} parameter(0)
  ROOT %f = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
    ],
)
def test_replica_groups_are_read_in_every_spelling(text, groups):
    assert hlo.replica_groups(text, 4) == groups


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (p0: bf16[2,16,64], p1: bf16[64,128]) -> bf16[2,16,128] {
  %p0 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[2,16,128]{2,1,0} convolution(%p0, %p1), window={size=1}, dim_labels=b0f_io0->b0f
}

%batched (p0: bf16[6,8,32], p1: bf16[6,32,8]) -> bf16[6,8,8] {
  %p0.1 = bf16[6,8,32]{2,1,0} parameter(0)
  %p1.1 = bf16[6,32,8]{2,1,0} parameter(1)
  ROOT %c = bf16[6,8,8]{2,1,0} convolution(%p0.1, %p1.1), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf
}

ENTRY %main (a: bf16[2,16,64], b: bf16[64,128], c: bf16[6,8,32], d: bf16[6,32,8]) -> bf16[2,16,128] {
  %a = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c2 = bf16[6,8,32]{2,1,0} parameter(2)
  %d = bf16[6,32,8]{2,1,0} parameter(3)
  %f2 = bf16[6,8,8]{2,1,0} fusion(%c2, %d), kind=kOutput, calls=%batched
  ROOT %f = bf16[2,16,128]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%fused_computation
}
"""


def test_products_written_as_convolutions_are_counted_and_what_stays_on_the_chip_is_no_traffic():
    text = TPU_TEXT.replace("b0f_io0->b0f", "b0f_0io->b0f").replace("p1: bf16[64,128]", "p1: bf16[1,64,128]")
    text = text.replace("%p1 = bf16[64,128]{1,0:", "%p1 = bf16[1,64,128]{2,1,0:")
    text = text.replace("%b = bf16[64,128]{1,0:", "%b = bf16[1,64,128]{2,1,0:")
    work = hlo.read(text, 1)
    assert work.flops == 2 * 2 * 16 * 64 * 128 + 2 * 6 * 8 * 32 * 8
    # b is in the chip's own memory.
    assert work.hbm_bytes == 2 * (2 * 16 * 64 + 2 * 16 * 128 + 6 * 8 * 32 + 6 * 32 * 8 + 6 * 8 * 8)


def test_splash_kernels_count_seven_products_forward_and_backward():
    shape = hlo.Shape("bf16", (2, 4, 2048, 128))
    parts = ("x/llm/splash_mha_fwd_x", "x/llm/splash_mha_dq_x", "x/llm/splash_mha_dkv_x")
    kernels = [hlo.Kernel(name, (shape,) * 3, (shape,), 1.0) for name in parts]
    full = 2.0 * 2 * 4 * 2048 * 2048 * 128
    assert sum(map(report.splash_flops, kernels)) == 9 * full * 5 / 8  # 4 blocks of 512: 10 of 16 are computed
    with pytest.raises(ValueError, match="unknown Pallas kernel"):
        report.splash_flops(hlo.Kernel("other", (shape,) * 3, (shape,), 1.0))


# The typical step.


def run_config(family, arguments, **changes) -> tuple[RunConfig, object]:
    config = from_dict(RunConfig, family.get_config(arguments).to_dict())
    return config, dataclasses.replace(config.stages[0], **changes)


def test_typical_step_has_the_shapes_of_real_batches():
    config, stage = run_config(flare, "l_3b,stage1", batch_size=16, packing=True, max_question_length=128)
    step = typical.step(config, stage, 4, 36)
    spec = layout_spec(config.model, stage.max_length, stage.max_question_length, stage.max_rounds)
    groups, crops = step.batch.crop_kind.shape
    real = lay_out_rows([[]] * len(step.batch.tokens), dataclasses.replace(spec, crops=crops), 36, groups)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), step.batch) == expected
    assert groups == 4 and len(step.batch.tokens) % 4 == 0
    assert 0.8 < step.tokens / step.batch.tokens.size <= 1
    assert flops.forward_flops(config.model, step.shape) > 0
    assert typical.mean_samples(config, stage, 4) >= 16 * 0.9


@pytest.mark.parametrize(("family", "arguments"), [(flare, "l_3b"), (flare, "x_3b"), (fusion, "3b")])
def test_random_batch_is_what_was_planned(family, arguments):
    config, stage = run_config(family, f"{arguments},stage1", batch_size=16, max_question_length=128)
    small = replace(config.model, **{"vision.image_size": 56, "vision.patch_size": 14, "image_tokens": 0})
    config = dataclasses.replace(config, model=small)
    step = typical.step(config, stage, 4, 36)
    batch, samples = typical.random_batch(config, stage, 4, 36)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), step.batch)
    real = flops.shape_of(batch)
    assert samples == step.samples and dataclasses.replace(real, lengths=(), crops=()) == dataclasses.replace(
        step.shape, lengths=(), crops=()
    )
    assert sorted(real.lengths) == sorted(step.shape.lengths) and sorted(real.crops) == sorted(step.shape.crops)


def test_typical_samples_keep_the_limits_of_their_stage():
    config, stage = run_config(fusion, "3b,stage1", batch_size=64, packing=True, max_question_length=64, max_rounds=3)
    spec = layout_spec(config.model, stage.max_length, 64, 3)
    samples = typical.draw(config.model, stage, spec, 400)
    assert max(s.questions for s in samples) <= 64
    assert max(s.measured.rounds for s in samples) == 3
    assert max(s.measured.length + 144 * s.measured.rounds for s in samples) <= stage.max_length
    assert all(s.measured.crops == 1 for s in samples)  # a zero image where there is none


# Refusals, all before anything is compiled.


def test_unknown_topology_lists_the_known_ones():
    with pytest.raises(UserError) as error:
        topology("v5p:3x3x3")
    for shape in ("v5e: 2x2", "4x4x8", "v6e"):
        assert shape in str(error.value)
    assert all(name.split(":")[0] in CHIPS for name in KNOWN)


@pytest.mark.parametrize(
    "mesh, message",
    [
        (MeshConfig(1, 96, 1), "asks for 96 device"),
        (MeshConfig(1, -1, 3), "3 does not divide the 128"),
    ],
)
def test_mesh_that_does_not_divide_is_one_sentence(mesh, message):
    config, stage = run_config(flare, "l_8b,stage1")
    with pytest.raises(UserError, match=message):
        program.prepare(dataclasses.replace(config, mesh=mesh), stage, topology("v5p:4x4x8"))


def test_batch_that_does_not_divide_is_one_sentence():
    config, stage = run_config(flare, "l_8b,stage1", batch_size=100, packing=False)
    with pytest.raises(UserError, match=r"100 rows in 1 microbatch.* do not divide over the 128 devices"):
        program.prepare(config, stage, topology("v5p:4x4x8"))


@pytest.mark.parametrize("text", ["fsdp", "model=4", "fsdp=x", "fsdp=2;tensor=2"])
def test_unreadable_mesh_names_the_axes(text):
    with pytest.raises(UserError, match="data=N, fsdp=N, tensor=N"):
        program.parse_mesh(text, MeshConfig())
    assert program.parse_mesh("fsdp=-1,tensor=2", MeshConfig()) == MeshConfig(1, -1, 2)


def test_compilers_complaint_about_memory_is_read():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 18.64G of 15.75G hbm."
    assert program._too_large(message) == (18.64 * 2**30, 15.75 * 2**30)
    assert program._too_large("INTERNAL: something else") == (0.0, 0.0)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install fusion_jax\[plan\]"):
        topology("v5e:2x2").devices()


# One whole plan.

TINY = {
    "vision.image_size": 128, "vision.width": 256, "vision.mlp_dim": 256, "vision.heads": 2, "vision.layers": 2,
    "llm.vocab_size": 500, "llm.width": 256, "llm.mlp_dim": 512, "llm.layers": 2, "llm.heads": 2, "llm.kv_heads": 2,
    "exchange.layers": 1, "exchange.heads": 2, "latent_counts": (4,),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install fusion_jax[plan]")
def test_tiny_model_is_planned_for_four_chips():
    config, stage = run_config(flare, "l_8b,stage1", batch_size=8, packing=True, max_length=256, max_question_length=64)
    config = dataclasses.replace(config, model=replace(config.model, **TINY), stages=(stage,))
    four = topology("v5e:2x2")
    found = report.analyse(program.compile_step(config, stage, four), four)
    line = report.line(found, 1e6)
    assert line["fits"] and 0 < line["hbm_gib_per_chip"] < 1
    assert line["bound_by"] in ("compute", "hbm", "interconnect")
    # Everything twice forward, once more backward as twice, and padding.
    assert 4 / 3 < line["compiled_over_model_flops"] < 6
    assert {axes for _, axes in found.collectives} == {"fsdp"}
    # At least every parameter but norms and biases, gathered for forward and backward in bfloat16.
    assert sum(found.collectives.values()) > 2 * 2 * 0.9 * found.program.parameter_count * 3 / 4
    assert 0 < line["mfu_bound"] < 0.75
    assert "fits" in report.table(found, 1e6)
