"""Planning: counting work in HLO by hand-checked programs on 8 CPU devices, typical steps, refusals, one whole plan."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import flare, fusion
from fusion_jax.config import MeshConfig, RunConfig, from_dict
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.devices import flops, gpus
from fusion_jax.devices.chips import topology
from fusion_jax.devices.tpus import CHIPS, KNOWN
from fusion_jax.errors import UserError
from fusion_jax.models.config import replace
from fusion_jax.planning import compiling, hlo, kernels, program, report, typical

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
    found = [hlo.Kernel(name, (shape,) * 3, (shape,), 1.0, "tpu_custom_call") for name in parts]
    full = 2.0 * 2 * 4 * 2048 * 2048 * 128
    assert sum(map(kernels.flops, found)) == 9 * full * 5 / 8  # 4 blocks of 512: 10 of 16 are computed
    assert {kernels.kind(kernel) for kernel in found} == {"splash attention"}
    with pytest.raises(ValueError, match="unknown kernel tpu_custom_call other"):
        kernels.flops(hlo.Kernel("other", (shape,) * 3, (shape,), 1.0, "tpu_custom_call"))


def _fmha(target: str, mask: str, window: int = 0) -> hlo.Kernel:
    """2 rows, 4 heads of 64; 256 queries and 512 keys."""
    shapes = [hlo.Shape("bf16", (2, length, 4, 64)) for length in (256, 512, 512)]
    config = (
        '"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": '
        f'["2", "4", "256", "512"]}}, "mask_type": "{mask}", "sliding_window_length": {window}}}'
    )
    return hlo.Kernel("attention", tuple(shapes), (shapes[0],), 1.0, target, config)


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
    found = [hlo.Kernel(name, (shape,) * 3, (shape,), 1.0, "__gpu$xla.gpu.triton") for name in names]
    full = 2.0 * 2 * 4 * 256 * 256 * 64
    # Blocks of 64 x 64: 1 + 2 + 3 + 4 of 16.
    assert [kernels.flops(kernel) for kernel in found] == [count * full * 10 / 16 for count in (2, 4, 3)]
    assert kernels.flops(found[0], packed=0.5) == full * 10 / 16
    with pytest.raises(ValueError, match="unknown kernel __gpu"):
        kernels.flops(dataclasses.replace(found[0], name="something else"))


def test_packed_rows_meet_in_their_segments_alone():
    """Blocks of 64: a row of 4 has 10 of them below its diagonal."""
    assert kernels.packed_share([256], 1, 256) == 1
    # Two segments of a block each, which may reach over two blocks: 3 of each row's 10.
    assert kernels.packed_share([64, 64], 2, 256) == 2 * 3 / 20


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
    work = hlo.read(GPU_TEXT, 4)
    product = 2.0 * 32 * 64 * 128
    assert work.flops == 3 * product
    attention = 2.0 * 2 * 4 * 256 * 256 * 64
    assert {kernels.kind(k): kernels.flops(k) * k.times for k in work.kernels} == {
        "cuDNN attention": 2 * attention,
        "Triton attention": 2 * attention * 10 / 16,
        "cuBLAS products": product,
    }
    everybody = ((0, 1, 2, 3),)
    assert [(c.kind, c.bytes, c.groups, c.times) for c in work.collectives] == [
        ("all-gather", 3 * (16 * 128 + 8) * 2, everybody, 3.0),
        ("reduce-scatter", 3 / 4 * 32 * 128 * 2, everybody, 3.0),
    ]
    # The loop's product, and what the three kernels read and write, once each.
    small, arrays = 32 * 64 + 64 * 128 + 32 * 128, 4 * 2 * 256 * 4 * 64
    assert work.hbm_bytes == 3 * 2 * small + 2 * (2 * arrays + 4 * 2 * 4 * 256) + 2 * small + 1024


# What chips do.


def test_gpus_of_a_node_use_nvlink_and_nodes_their_network():
    eight, nodes = topology("h100:8"), topology("h100:8x2")
    node = [SimpleNamespace(slice_index=0)] * 8
    both = node + [SimpleNamespace(slice_index=1)] * 8
    assert eight.seconds("all-gather", 450e9, node) == 1
    # Of 16 parts a GPU sends 15. Each node has to send its 8, by 8 adapters: one part each.
    assert nodes.seconds("all-gather", 15 * 50e9, both) == max(1, 15 * 50 / 450)
    assert nodes.seconds("all-gather", 15 * 50e9, both) == nodes.seconds("all-reduce", 15 * 50e9, both)
    # Everybody with everybody: 8 of its 15 parts go to the other node. One of each node: all of it.
    assert nodes.seconds("all-to-all", 15 * 50e9, both) == 8
    assert nodes.seconds("reduce-scatter", 50e9, [both[0], both[-1]]) == 1
    assert nodes.seconds("collective-permute", 50e9, [both[0], both[-1]]) == 1
    assert (nodes.chips, nodes.slices, eight.chips, topology("b200:1").chips) == (16, 2, 8, 1)


def test_gpus_have_the_share_of_their_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    whole = gpus.CARDS["h100"].memory
    assert topology("h100:1").limit == 0.92 * whole
    flags = (Path(__file__).parents[2] / "launch" / "xla_flags.sh").read_text()
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" in flags
    assert all(f"{name}=true" in flags for name in topology("h100:1").options)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert topology("h100:1").limit == 0.5 * whole
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "75")
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=75 is no share"):
        gpus.memory_share()


# Compiling.


class _Slow:
    """A program that takes that long to compile."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def compile(self, compiler_options):
        time.sleep(self.seconds)
        if compiler_options is None:
            raise TimeoutError("the compiler's own")
        return compiler_options


def test_long_compilations_say_that_they_live(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "_EVERY", 0.3)
    assert compiling.compiled(_Slow(1.0), "stage1 for h100:8", {"a": 1}) == {"a": 1}
    lines = capsys.readouterr().err.splitlines()
    assert lines and set(lines) <= {f"compiling stage1 for h100:8, {n} s so far" for n in (0, 1)}
    with pytest.raises(TimeoutError, match="the compiler's own"):
        compiling.compiled(_Slow(0.0), "stage1")


def test_in_a_terminal_the_line_goes_again(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    compiling.compiled(_Slow(1.5), "stage1", {})
    assert capsys.readouterr().err == "\rcompiling stage1, 1 s so far\x1b[K\r\x1b[K"


def test_ctrl_c_does_not_wait_for_the_compiler():
    begin = time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compiling.compiled(_Slow(20.0), "stage1")
    assert time.monotonic() - begin < 10


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


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "h100:16", "h100:8x0", "h100:8x4x2", "h100:x"])
def test_gpus_that_no_node_has_are_one_sentence(name):
    with pytest.raises(UserError, match=r"kind:GPUS or kind:GPUSxNODES.*a100, h100, h200, b200"):
        topology(name)


def test_nodes_are_written_into_the_topology():
    with pytest.raises(UserError, match="--slices=2 is for TPUs"):
        topology("h100:8", 2)
    with pytest.raises(UserError, match=r"v5p.*h100"):
        topology("h300:8")


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
    with pytest.raises(UserError, match=r"pip install fusion_jax\[plan-gpu\]"):
        topology("h100:8").devices()


@pytest.fixture
def not_compiled(monkeypatch) -> program.Program:
    """FLARE-L 3B on one H100 of which JAX takes three quarters: 65 GiB of parameters and moments for 59."""
    config, stage = run_config(flare, "l_3b,stage1", accumulation=32)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    monkeypatch.setattr(gpus.GpuTopology, "devices", lambda self: jax.devices()[:1])
    return program.compile_step(config, stage, topology("h100:1"))


def test_what_kernels_read_and_write_counts_once(not_compiled):
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,256,4,64]) -> bf16[2,256,4,64] {
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  ROOT %o = bf16[2,256,4,64]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton",
    metadata={op_name="jit(step)/segment_flash_forward/pallas_call"}
}
"""
    found = report.analyse(dataclasses.replace(not_compiled, text=text), topology("h100:1"))
    assert found.hbm_bytes == 4 * 2 * 2 * 256 * 4 * 64
    assert 0 < found.kernels["Triton attention"] < 2 * 2.0 * 2 * 4 * 256 * 256 * 64 * 10 / 16
    assert found.compiled_flops == found.kernels["Triton attention"]


def test_state_that_is_too_much_for_a_gpu_is_not_compiled(not_compiled):
    found = report.analyse(not_compiled, topology("h100:1"))
    line = report.line(found, 1e6)
    assert (line["fits"], line["compile_seconds"], line["mfu_bound"]) == (False, None, None)
    assert line["hbm_gib_per_chip"] == pytest.approx(65, abs=1)
    table = report.table(found, 1e6)
    assert "not compiled" in table and "of 59.33 (75% of the card's 79.1" in table and "DOES NOT FIT" in table


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


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install fusion_jax[plan]")
def test_compiler_for_tpus_complains_of_nothing():
    code = "from fusion_jax.devices.chips import topology; print(len(topology('v5e:2x2').devices()))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=clean)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


NO_CUDA = all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13))


@pytest.mark.skipif(NO_CUDA, reason="needs pip install fusion_jax[plan-gpu]")
def test_tiny_model_is_planned_for_two_nodes_of_gpus():
    config, stage = run_config(flare, "l_8b,stage1", batch_size=8, packing=True, max_length=256, max_question_length=64)
    model = replace(config.model, **TINY | {"vision.image_size": 192})  # long enough for cuDNN
    config = dataclasses.replace(config, model=model, stages=(stage,))
    four = topology("h100:2x2")
    found = report.analyse(program.compile_step(config, stage, four), four)
    line = report.line(found, 1e6)
    assert line["fits"] and 0 < line["hbm_gib_per_chip"] < 1
    kinds = {"generated products", "cuDNN attention", "Triton attention"}
    assert kinds <= set(line["flops_by_kernel"]) <= kinds | {"cuBLAS products"}
    assert 1.1 < line["compiled_over_model_flops"] < 6
    assert 0 < line["mfu_bound"] < 0.75
    assert {axes for _, axes in found.collectives} == {"fsdp"}
    assert sum(found.collectives.values()) > 2 * 2 * 0.9 * found.program.parameter_count * 3 / 4
    table = report.table(found, 1e6)
    assert "of 72.78 (92% of the card's 79.1, XLA_PYTHON_CLIENT_MEM_FRACTION): fits" in table
    assert "GPU-hours" in table and "chip" not in table
