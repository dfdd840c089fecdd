"""Counting work in optimized HLO, by hand-checked programs on 8 CPU devices and by texts for TPUs and GPUs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import flare
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.layout import measure
from fusion_jax.data.typical import typical_steps
from fusion_jax.models import segment_flash_tpu
from fusion_jax.planning import collectives, hlo, kernels, report, work

DEVICES = 8


# Where axes (data 2, fsdp 4, tensor 1) are of a mesh of 8 devices counted up; no device is needed for their names.
MESH = SimpleNamespace(devices=np.arange(DEVICES).reshape(2, 4, 1))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Optimized HLO of small programs; devices are counted once in a process, so another one compiles them."""
    worker = Path(__file__).parents[1] / "helpers" / "plan_programs.py"
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Counting.


def test_scan_of_gathered_layers_is_counted_by_its_trips(texts):
    """5 layers of (64, 64) sharded over fsdp, 16 rows over all 8 devices: 2 rows each."""
    counted = work.read(texts["layers"], DEVICES)
    assert counted.flops == 5 * 3 * 2 * 2 * 64 * 64  # forward, by x, by w
    [gather] = [c for c in counted.collectives if c.kind == "all-gather"]
    assert gather.times == 5
    assert gather.bytes == 64 * 64 * 4 * 3 / 4  # three of four parts come from others
    assert report.axes_of(gather.groups, MESH) == "fsdp"
    reduced = [c for c in counted.collectives if c.kind == "all-reduce"]
    assert sum(c.times * c.bytes for c in reduced) == 5 * 2 * 64 * 64 * 4 * 7 / 8
    assert {report.axes_of(c.groups, MESH) for c in reduced} == {"data+fsdp"}


def test_loop_whose_rounds_the_data_decides_takes_the_given_number(texts):
    assert work.read(texts["loop"], 1, 7).flops == 7 * 2 * 32**3


def test_batched_products_and_nested_scans_are_counted(texts):
    assert work.read(texts["nested"], 1).flops == 4 * 3 * 6 * 2 * 40**3


@pytest.mark.parametrize("axes, members", [("data", 2), ("fsdp", 4), ("data+fsdp", 8)])
def test_collectives_are_told_apart_by_mesh_axis(texts, axes, members):
    [one] = work.read(texts[axes], DEVICES).collectives
    assert (one.kind, report.axes_of(one.groups, MESH)) == ("all-reduce", axes)
    assert one.bytes == 2 * 128 * 4 * (members - 1) / members


def test_loops_without_a_written_count_are_read_from_their_condition(texts):
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", texts["nested"])
    assert text != texts["nested"]
    assert work.read(text, 1).flops == 4 * 3 * 6 * 2 * 40**3


def test_collective_spread_over_fusions_counts_once():
    counted = work.read(SPREAD_TEXT, 4)
    [one] = counted.collectives
    assert (one.kind, one.bytes, one.groups) == ("all-gather", 3 * 8 * 16 * 2, ((0, 1, 2, 3),))
    assert one.exposed


def test_collective_is_exposed_unless_a_product_runs_beside_it():
    product = "  %d = f32[8,8]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
    [one] = work.read(SPREAD_TEXT.replace("  ROOT %g.1", f"{product}  ROOT %g.1"), 4).collectives
    assert not one.exposed  # the second of its two fusions computes
    beside = re.search(r"  %y = .*\n.*\n", GPU_TEXT)[0]
    exposed = []
    for before in ("  %gather = ", "  %gathered = ", "  %part = "):
        moved = GPU_TEXT.replace(beside, "").replace(before, beside + before)
        exposed.append([one.exposed for one in work.read(moved, 4).collectives])
    assert exposed == [[True, True], [False, True], [True, False]]


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
    [one] = work.read(SCATTER_TEXT, 4).collectives
    assert (one.kind, one.bytes) == ("reduce-scatter", 3 / 4 * 32 * 16 * 2)
    whole = SCATTER_TEXT.replace("ROOT %s = bf16[8,16]{1,0} dynamic-slice", "ROOT %s = bf16[8,16]{1,0} slice")
    [one] = work.read(whole, 4).collectives
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
    assert collectives.replica_groups(text, 4) == groups


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
    counted = work.read(text, 1)
    assert counted.flops == 2 * 2 * 16 * 64 * 128 + 2 * 6 * 8 * 32 * 8
    # b is in the chip's own memory.
    assert counted.hbm_bytes == 2 * (2 * 16 * 64 + 2 * 16 * 128 + 6 * 8 * 32 + 6 * 32 * 8 + 6 * 8 * 8)


def test_splash_kernels_count_seven_products_forward_and_backward():
    shape = hlo.Shape("bf16", (2, 4, 2048, 128))
    parts = ("x/llm/splash_mha_fwd_x", "x/llm/splash_mha_dq_x", "x/llm/splash_mha_dkv_x")
    calls = [work.Kernel(name, (shape,) * 3, (shape,), 1.0, "tpu_custom_call") for name in parts]
    full = 2.0 * 2 * 4 * 2048 * 2048 * 128
    assert sum(map(kernels.flops, calls)) == 9 * full * 5 / 8  # 4 blocks of 512: 10 of 16 are computed
    assert {kernels.kind(kernel) for kernel in calls} == {"splash attention"}
    with pytest.raises(ValueError, match="unknown kernel tpu_custom_call other"):
        kernels.flops(work.Kernel("other", (shape,) * 3, (shape,), 1.0, "tpu_custom_call"))


def test_flash_kernels_of_tpus_count_seven_products_of_the_blocks_that_segments_leave():
    query, key = hlo.Shape("bf16", (2, 4, 512, 96)), hlo.Shape("bf16", (2, 2, 512, 96))
    operands = (hlo.Shape("s32", (16,)), query, key, key, hlo.Shape("s32", (2, 1, 512)))
    full = 2.0 * 2 * 4 * 512 * 512 * 96

    def both(place: str) -> list[work.Kernel]:
        names = [f"x/{place}/segment_flash_tpu_{part}/pallas_call" for part in ("forward", "backward")]
        return [work.Kernel(name, operands, (query,), 1.0, "tpu_custom_call") for name in names]

    assert [kernels.flops(kernel) for kernel in both("vision")] == [2 * full, 5 * full]
    # 4 blocks of 128: 10 of 16 are below the diagonal.
    assert sum(map(kernels.flops, both("llm"))) == 7 * full * 10 / 16
    assert kernels.flops(both("llm")[0], lambda block: {128: 0.5}[block]) == full * 10 / 16
    assert {kernels.kind(kernel) for kernel in both("llm")} == {"flash attention"}


def _fmha(target: str, mask: str, window: int = 0) -> work.Kernel:
    """2 rows, 4 heads of 64; 256 queries and 512 keys."""
    shapes = [hlo.Shape("bf16", (2, length, 4, 64)) for length in (256, 512, 512)]
    config = (
        '"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": '
        f'["2", "4", "256", "512"]}}, "mask_type": "{mask}", "sliding_window_length": {window}}}'
    )
    return work.Kernel("attention", tuple(shapes), (shapes[0],), 1.0, target, config)


def test_cudnn_kernels_count_the_products_that_their_mask_leaves():
    full = 2.0 * 2 * 4 * 256 * 512 * 64
    forward, backward = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"
    assert kernels.flops(_fmha(forward, "NO_MASK")) == 2 * full
    assert kernels.flops(_fmha(backward, "NO_MASK")) == 5 * full
    # Blocks of 128: 2 x 4, of which a causal mask leaves 1 and 2.
    assert kernels.flops(_fmha(forward, "PADDING_CAUSAL")) == 2 * full * 3 / 8
    # A window of one position leaves each row of blocks its last.
    assert kernels.flops(_fmha(backward, "CAUSAL", window=1)) == 5 * full * 2 / 8
    assert kernels.kind(_fmha(forward, "NO_MASK")) == "cuDNN attention"


def test_triton_kernels_count_nine_products_of_the_blocks_below_the_diagonal():
    shape = hlo.Shape("bf16", (2, 256, 4, 64))
    names = [f"a/segment_flash_{part}/pallas_call" for part in ("forward", "keys", "queries")]
    calls = [work.Kernel(name, (shape,) * 3, (shape,), 1.0, "__gpu$xla.gpu.triton") for name in names]
    full = 2.0 * 2 * 4 * 256 * 256 * 64
    # Blocks of 64 x 64: 1 + 2 + 3 + 4 of 16.
    assert [kernels.flops(kernel) for kernel in calls] == [count * full * 10 / 16 for count in (2, 4, 3)]
    assert kernels.flops(calls[0], lambda block: {64: 0.5}[block]) == full * 10 / 16
    with pytest.raises(ValueError, match="unknown kernel __gpu"):
        kernels.flops(dataclasses.replace(calls[0], name="something else"))


def test_packed_rows_meet_in_their_segments_alone():
    """Blocks of 64: a row of 4 has 10 of them below its diagonal."""
    assert kernels.packed_share([256], 1, 256, 64) == 1
    # Two segments of a block each, in their own blocks, in one of two rows.
    assert kernels.packed_share([64, 64], 2, 256, 64) == 2 / 20
    # 96 and 96 positions: blocks 0 and 1; then 1 with itself, which is counted already, and 2 with both.
    assert kernels.packed_share([96, 96], 1, 256, 64) == (3 + 2) / 10
    # The third does not fit into the first row.
    assert kernels.packed_share([96, 96, 96], 2, 256, 64) == (3 + 2 + 3) / 20


def test_attention_of_typical_packed_steps_on_tpus_is_near_what_their_segments_need():
    """On average over the steps of a stage, those of long questions included."""
    config, block = from_dict(RunConfig, flare.get_config("l_8b,stage2").to_dict()), segment_flash_tpu.BLOCK
    computed, needed = 0.0, 0.0
    for spec, sizes, examples, latents in typical_steps(config, config.stages[0], 8, 40):
        lengths = [measure(example, spec, latents).length for example in examples]
        assert spec.length == 4096
        share = kernels.packed_share(lengths, sizes.rows, spec.length, block)
        whole = kernels.computed(spec.length, spec.length, (block, block)) * spec.length**2
        computed += sizes.rows * share * whole
        needed += sum(n * (n + 1) / 2 for n in lengths)
    assert 1.0 < computed / needed < 1.3


GPU_TEXT = r"""HloModule jit_step, is_scheduled=true, num_partitions=4

%gemm_fusion_dot.1_computation (p0: bf16[32,64], p1: bf16[64,128]) -> bf16[32,128] {
  %p0 = bf16[32,64]{1,0} parameter(0)
  %p1 = bf16[64,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[32,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0},
    backend_config={"sizes":["16"]}
}

%body (state: (s32[], bf16[32,64], bf16[16,128])) -> (s32[], bf16[32,64], bf16[16,128]) {
  %state = (s32[], bf16[32,64]{1,0}, bf16[16,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[32,64]{1,0} get-tuple-element(%state), index=1
  %w = bf16[16,128]{1,0} get-tuple-element(%state), index=2
  %gather = ((bf16[16,128]{1,0}, bf16[8]{0}), (bf16[64,128]{1,0}, bf16[32]{0})) all-gather-start(%w, %b),
    channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0},
    backend_config={"collective_backend_config":{"is_sync":false}}
  %b = bf16[8]{0} constant({...})
  %gathered = (bf16[64,128]{1,0}, bf16[32]{0}) all-gather-done(%gather)
  %whole = bf16[64,128]{1,0} get-tuple-element(%gathered), index=0
  %y = bf16[32,128]{1,0} fusion(%x, %whole), kind=kCustom, calls=%gemm_fusion_dot.1_computation,
    backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %scatter = (bf16[32,128]{1,0}, bf16[8,128]{1,0}) reduce-scatter-start(%y), channel_id=2, replica_groups={{0,1,
    2,3}}, dimensions={0}, to_apply=%add
  %part = bf16[8,128]{1,0} reduce-scatter-done(%scatter)
  ROOT %next = (s32[], bf16[32,64]{1,0}, bf16[16,128]{1,0}) tuple(%i, %x, %w)
}

%condition (state: (s32[], bf16[32,64], bf16[16,128])) -> pred[] {
  %state.1 = (s32[], bf16[32,64]{1,0}, bf16[16,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (x: bf16[32,64], w: bf16[16,128], q: bf16[2,256,4,64]) -> bf16[32,128] {
  %x.1 = bf16[32,64]{1,0} parameter(0)
  %w.1 = bf16[16,128]{1,0} parameter(1)
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[32,64]{1,0}, bf16[16,128]{1,0}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], bf16[32,64]{1,0}, bf16[16,128]{1,0}) while(%first), condition=%condition, body=%body,
    backend_config={"known_trip_count":{"n":"3"}}
  %attended = (bf16[2,256,4,64]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q),
    custom_call_target="__cudnn$fmhaScaleBiasSoftmax",
    backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "4", "256",
    "256"]}, "mask_type": "NO_MASK"}}
  %flash = (bf16[2,256,4,64]{3,2,1,0}, f32[2,4,256]{2,1,0}) custom-call(%q, %q, %q),
    custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/segment_flash_forward/pallas_call"},
    backend_config={grid_x = 2 : i32, ir = "ML\EFR{(\0D"}
  %rows = bf16[32,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %z = (bf16[32,128]{1,0}, s8[1024]{0}) custom-call(%rows, %whole.1), custom_call_target="__cublas$gemm",
    backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],
    "rhs_contracting_dimensions":["0"]}}}
  %whole.1 = bf16[64,128]{1,0} constant({...})
}
"""


def test_programs_for_gpus_are_read_with_their_loops_collectives_and_kernels():
    counted = work.read(GPU_TEXT, 4)
    product = 2.0 * 32 * 64 * 128
    assert counted.flops == 3 * product
    attention = 2.0 * 2 * 4 * 256 * 256 * 64
    assert {kernels.kind(k): kernels.flops(k) * k.times for k in counted.kernels} == {
        "cuDNN attention": 2 * attention,
        "Triton attention": 2 * attention * 10 / 16,
        "cuBLAS products": product,
    }
    everybody = ((0, 1, 2, 3),)
    assert [(c.kind, c.bytes, c.groups, c.times) for c in counted.collectives] == [
        ("all-gather", 3 * (16 * 128 + 8) * 2, everybody, 3.0),
        ("reduce-scatter", 3 / 4 * 32 * 128 * 2, everybody, 3.0),
    ]
    # The loop's product, and what the three kernels read and write, once each.
    small, arrays = 32 * 64 + 64 * 128 + 32 * 128, 4 * 2 * 256 * 4 * 64
    assert counted.hbm_bytes == 3 * 2 * small + 2 * (2 * arrays + 4 * 2 * 4 * 256) + 2 * small + 1024


SLICED_TEXT = """HloModule jit_step, is_scheduled=true

%layer (p: bf16[32,16], q: bf16[16]) -> bf16[16] {
  %p = bf16[32,16]{1,0} parameter(0)
  %q = bf16[16]{0} parameter(1)
  %s = bf16[1,16]{1,0} slice(%p), slice={[3:4], [0:16]}
  %b = bf16[16]{0} bitcast(%s)
  ROOT %r = bf16[16]{0} add(%b, %q)
}

ENTRY %main (a: bf16[32,16], q: bf16[16]) -> bf16[16] {
  %a = bf16[32,16]{1,0} parameter(0)
  %q = bf16[16]{0} parameter(1)
  %s = bf16[2,16]{1,0} slice(%a), slice={[4:6], [0:16]}
  ROOT %f = bf16[16]{0} fusion(%a, %q), kind=kLoop, calls=%layer
}
"""


def test_of_an_array_that_is_only_sliced_the_slices_are_read():
    assert work.read(SLICED_TEXT, 1).hbm_bytes == 2 * (2 * 2 * 16 + 3 * 16)
