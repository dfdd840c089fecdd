"""Planning: compilations, typical steps, refusals before anything is compiled, and whole plans of a tiny model."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from configs import flare, fusion
from fusion_jax.config import MeshConfig, RunConfig, from_dict
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out_rows, measure
from fusion_jax.data.typical import draw, random_batch
from fusion_jax.devices import flops, gpus
from fusion_jax.devices.chips import topology
from fusion_jax.errors import UserError
from fusion_jax.models.config import replace
from fusion_jax.planning import compiling, program, report, search, typical

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
    assert typical.average(config, stage, 4).samples >= 16 * 0.9


@pytest.mark.parametrize(("family", "arguments"), [(flare, "l_3b"), (flare, "x_3b"), (fusion, "3b")])
def test_random_batch_is_what_was_planned(family, arguments):
    config, stage = run_config(family, f"{arguments},stage1", batch_size=16, max_question_length=128)
    small = replace(config.model, **{"vision.image_size": 56, "vision.patch_size": 14, "image_tokens": 0})
    config = dataclasses.replace(config, model=small)
    step = typical.step(config, stage, 4, 36)
    batch, samples = random_batch(config, stage, 4, 36)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), step.batch)
    real = flops.shape_of(batch)
    assert samples == step.samples and dataclasses.replace(real, lengths=(), crops=()) == dataclasses.replace(
        step.shape, lengths=(), crops=()
    )
    assert sorted(real.lengths) == sorted(step.shape.lengths) and sorted(real.crops) == sorted(step.shape.crops)


def test_typical_samples_keep_the_limits_of_their_stage():
    config, stage = run_config(fusion, "3b,stage1", batch_size=64, packing=True, max_question_length=64, max_rounds=3)
    spec = layout_spec(config.model, stage.max_length, 64, 3)
    examples = draw(config.model, stage, spec, 400)
    sizes = [measure(example, spec, 144) for example in examples]
    assert max(len(example.question_ids) for example in examples) <= 64
    assert max(size.rounds for size in sizes) == 3
    assert max(size.length for size in sizes) <= stage.max_length
    assert all(size.crops == 1 for size in sizes)  # a zero image where there is none


# Refusals, all before anything is compiled.


@pytest.mark.parametrize(
    "mesh, message",
    [
        (MeshConfig(1, 96, 1), "needs 96 device"),
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
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries ({}) exceeds available HBM ({})."
    for sizes in (("100.50G", "95.74G"), ("100.50GiB", "95.74GiB"), ("107911053312", "102800041574")):
        needed, limit = program._too_large(message.format(*sizes))
        assert needed == 100.5 * 2**30 and limit == pytest.approx(95.74 * 2**30)
    assert program._too_large("INTERNAL: something else") == (0.0, 0.0)


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
    analysed = report.analyse(dataclasses.replace(not_compiled, text=text), topology("h100:1"))
    assert analysed.hbm_bytes == 4 * 2 * 2 * 256 * 4 * 64
    assert 0 < analysed.kernels["Triton attention"] < 2 * 2.0 * 2 * 4 * 256 * 256 * 64 * 10 / 16
    assert analysed.compiled_flops == analysed.kernels["Triton attention"]


def test_state_that_is_too_much_for_a_gpu_is_not_compiled(not_compiled):
    analysed = report.analyse(not_compiled, topology("h100:1"))
    line = report.line(analysed, 1e6)
    assert (line["fits"], line["compile_seconds"], line["mfu_bound"]) == (False, None, None)
    assert line["hbm_gib_per_chip"] == pytest.approx(65, abs=1)
    table = report.table(analysed, 1e6)
    assert "not compiled" in table and "of 59.33 (75% of the card's 79.1" in table and "DOES NOT FIT" in table


# The search, without a compiler.


def test_search_tries_both_gathers_and_keeps_the_faster_for_other_batch_sizes(monkeypatch):
    config, stage = run_config(flare, "l_8b,stage1", batch_size=64)
    tried = []

    def compile_step(config, stage, topology, latent_count):
        tried.append((config.mesh.fsdp, stage.gather, stage.batch_size))
        shape = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
        mesh = SimpleNamespace(shape=shape)
        return SimpleNamespace(config=config, stage=stage, mesh=mesh, fits=True, needed=1.0, limit=2.0, compiled=True)

    def analyse(compiled, topology):
        speed = compiled.mesh.shape["fsdp"] + (compiled.stage.gather == "step") / 2
        return SimpleNamespace(program=compiled, samples_per_second=speed, mfu=0.5, bound_by="interconnect")

    monkeypatch.setattr(search.program, "prepare", lambda *arguments: None)
    monkeypatch.setattr(search.program, "compile_step", compile_step)
    monkeypatch.setattr(search.report, "analyse", analyse)
    config = dataclasses.replace(config, mesh=MeshConfig(1, 8, 1))
    best = search.search(config, stage, topology("h100:8"), ("full",))[0]
    assert best.program.stage.gather == "step"
    assert tried[-3:] == [(8, "step", 64), (8, "step", 128), (8, "step", 32)]


# One whole plan.

TINY = {
    "vision.image_size": 128, "vision.width": 256, "vision.mlp_dim": 256, "vision.heads": 2, "vision.layers": 2,
    "llm.vocab_size": 500, "llm.width": 256, "llm.mlp_dim": 512, "llm.layers": 2, "llm.heads": 2, "llm.kv_heads": 2,
    "exchange.layers": 1, "exchange.heads": 2, "latent_counts": (4,),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[plan]'")
def test_tiny_model_is_planned_for_four_chips():
    config, stage = run_config(flare, "l_8b,stage1", batch_size=8, packing=True, max_length=256, max_question_length=64)
    config = dataclasses.replace(config, model=replace(config.model, **TINY), stages=(stage,))
    four = topology("v5e:2x2")
    analysed = report.analyse(program.compile_step(config, stage, four), four)
    line = report.line(analysed, 1e6)
    assert line["fits"] and 0 < line["hbm_gib_per_chip"] < 1
    assert line["bound_by"] in ("compute", "hbm", "interconnect")
    # Every product once forward and as two backward (remat `dots` keeps them), more for attention, and padding.
    assert 1 < line["compiled_over_model_flops"] < 6
    assert {axes for _, axes in analysed.collectives} == {"fsdp"}
    # At least every parameter but norms and biases, gathered for forward and backward in bfloat16.
    assert sum(analysed.collectives.values()) > 2 * 2 * 0.9 * analysed.program.parameter_count * 3 / 4
    assert 0 < line["mfu_bound"] < 0.75
    assert "fits" in report.table(analysed, 1e6)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[plan]'")
def test_compiler_for_tpus_complains_of_nothing():
    code = "from fusion_jax.devices.chips import topology; print(len(topology('v5e:2x2').devices()))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=clean)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


NO_CUDA = all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13))


@pytest.mark.skipif(NO_CUDA, reason="needs pip install -e '.[plan_gpu]'")
def test_tiny_model_is_planned_for_two_nodes_of_gpus():
    config, stage = run_config(flare, "l_8b,stage1", batch_size=8, packing=True, max_length=256, max_question_length=64)
    model = replace(config.model, **TINY | {"vision.image_size": 192})  # long enough for cuDNN
    config = dataclasses.replace(config, model=model, stages=(stage,))
    four = topology("h100:2x2")
    analysed = report.analyse(program.compile_step(config, stage, four), four)
    line = report.line(analysed, 1e6)
    assert line["fits"] and 0 < line["hbm_gib_per_chip"] < 1
    kinds = {"generated products", "cuDNN attention", "Triton attention"}
    assert kinds <= set(line["flops_by_kernel"]) <= kinds | {"cuBLAS products"}
    assert 1.1 < line["compiled_over_model_flops"] < 6
    assert 0 < line["mfu_bound"] < 0.75
    assert {axes for _, axes in analysed.collectives} == {"fsdp"}
    assert sum(analysed.collectives.values()) > 2 * 2 * 0.9 * analysed.program.parameter_count * 3 / 4
    table = report.table(analysed, 1e6)
    assert "of 72.78 (92% of the card's 79.1, XLA_PYTHON_CLIENT_MEM_FRACTION): fits" in table
    assert "GPU-hours" in table and "chip" not in table
