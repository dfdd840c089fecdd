"""Which operations a trace's time goes to: names to kinds, sums, and a real trace."""

import jax
import jax.numpy as jnp
import pytest

from fusion_jax.devices import op_times
from fusion_jax.devices.op_times import Event

MS = 1e6


@pytest.mark.parametrize(
    ("name", "operation", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather-start.3", "between devices"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6", "custom-call.5", "cuDNN attention"),
        ("segment_flash_keys", "custom-call.9", "Triton attention"),
        ("gemm_fusion_dot_general_12", "gemm_fusion_dot_general.12", "Triton product"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "custom-call.77", "cuBLAS product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "", "cuBLAS product"),
        ("ffi_call.39", "ffi_call.39", "CPU attention"),
        ("ynn_fusion.7", "ynn_fusion.7", "YNNPACK product"),
        ("MemcpyD2D", "", "copy"),
        ("loop_dynamic_update_slice_fusion_3", "", "copy"),
        ("input_scatter_fusion", "", "gather or scatter"),
        ("input_reduce_fusion_4", "", "reduction"),
        ("loop_multiply_fusion", "", "elementwise"),
        ("something_new", "", "other"),
    ],
)
def test_kinds(name, operation, kind):
    assert op_times.kind(name, operation) == kind


def test_summary_adds_by_operation_and_sees_what_runs_at_once():
    events = [
        Event("nvjet_a", "custom-call.1", 0, 4 * MS),
        Event("nvjet_a", "custom-call.2", 4 * MS, 6 * MS),
        Event("loop_fusion", "fusion.1", 1 * MS, 3 * MS),  # on another stream
        Event("loop_fusion", "fusion.1", 8 * MS, 10 * MS),
    ]
    program = (
        '  %custom-call.1 = bf16[8] custom-call(%a), metadata={op_type="x" op_name="jit(step)/while/body/mlp/dot"}'
    )
    summary = op_times.summary(events, steps=2, program=program)
    assert summary["span_ms"] == 5 and summary["busy_share"] == 0.8
    assert summary["kinds"] == [
        {"kind": "cuBLAS product", "ms": 3.0, "share": 0.6},
        {"kind": "elementwise", "ms": 2.0, "share": 0.4},
    ]
    first, *_, last = summary["dearest"]
    assert first["operation"] == "custom-call.1" and first["ms"] == 2.0 and first["source"] == "jit(step)/mlp/dot"
    assert last["operation"] == "custom-call.2" and last["calls"] == 0.5
    assert len(op_times.summary(events, 2, dearest=1)["dearest"]) == 1


def test_kernels_without_an_instruction_are_looked_up_by_their_name():
    program = '  ROOT %loop_add_fusion.3 = f32[8] fusion(%a), metadata={op_name="jit(step)/add"}'
    [row] = op_times.summary([Event("loop_add_fusion_3", "", 0, MS)], 1, program)["dearest"]
    assert row["operation"] == "loop_add_fusion_3" and row["source"] == "jit(step)/add"


def test_real_trace(tmp_path):
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sort(y @ x), x))
    x = jnp.ones((64, 64))
    compiled = program.lower(x).compile()
    with pytest.raises(FileNotFoundError, match="no trace"):
        op_times.read(tmp_path)
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready([compiled(x) for _ in range(2)])
    summary = op_times.summary(op_times.read(tmp_path), 2, compiled.as_text())
    assert 0 < summary["busy_share"] <= 1 and summary["span_ms"] > 0
    sort = next(row for row in summary["dearest"] if row["operation"].startswith("sort"))
    # On a CPU an instruction may be several events.
    assert sort["calls"] % 3 == 0 and sort["kind"] == "gather or scatter" and sort["source"].endswith("sort")
    assert not any(row["operation"].startswith("while") for row in summary["dearest"])
