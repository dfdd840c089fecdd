"""Every program of the product compiles for TPUs and GPUs, with the kernels, dtypes and independence of the host that
it is meant to have. Nothing runs: the compilers need no device (`programs.py`).

The part for TPUs needs libtpu (`pip install -e '.[plan]'`), that for GPUs 4 GB of CUDA libraries
(`pip install -e '.[plan_gpu]'`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import facts
import programs
import pytest

LIMIT = 1500  # seconds of a process, on a machine that does much else
INSTALLED = {
    "tpu": importlib.util.find_spec("libtpu") is not None,
    "gpu": any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
}
# Float32 products that are meant, by the equation or function that they stand in.
PERMITTED = {
    # Sums over the places of a word, of attention weights and embeddings that were computed in bfloat16.
    "pictures": {"khtp,t->hkp", "khpt,t->hkp", "hqk,q->hk", "sd,s->d", "jit(measure_word)"},
    # Newton-Schulz steps, whose products have no name beyond that of the operation.
    "muon step": {""},
}


def platform(target: str) -> str:
    return target[:3]


def needed(target: str):
    extra = {"tpu": "plan", "gpu": "plan-gpu"}[platform(target)]
    return pytest.mark.skipif(not INSTALLED[platform(target)], reason=f"needs pip install -e '.[{extra}]'")


def cases(planted: bool) -> list:
    return [
        pytest.param(target, name, marks=needed(target), id=f"{target}-{name}")
        for target, described in programs.TARGETS.items()
        for group in described.groups
        for name in group.names
        if name.startswith("planted") == planted
    ]


@pytest.fixture(scope="module")
def compiled(request):
    """target -> its programs: processes of their own compile for those that were chosen, two at a time."""
    chosen = {item.callspec.params.get("target") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(2) as pool:
        names = [name for name in programs.TARGETS if name in chosen and INSTALLED[platform(name)]]
        runs = {name: pool.submit(_compile, name) for name in names}
        yield lambda target: runs[target].result()


def _compile(target: str) -> dict[str, dict]:
    worker = Path(programs.__file__)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(worker), target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    return lines | {"": {"error": f"the compiler ended with code {done.returncode}:\n{done.stderr[-3000:]}"}}


def kernels(target: str, name: str) -> dict[str, int]:
    """Attention kernels that the program must have, and how often: of the encoder's halves and of the LLM.

    In each half there is one kernel for each kind of view; early text has too few scores for one.

    Forward kernels run again in a backward pass only where the remat policy keeps nothing.
    """
    if not any(part in name for part in ("step", "validation", "prefill", "pictures")):
        return {}  # one token attends, or none
    encoder, llm = 0 if "text alone" in name else 4 if "quadrants" in name else 2, 1
    if platform(target) == "gpu" and name.startswith(("server", "pictures")):  # each block has its own weights
        llm = programs.TINY["llm.layers"]
    if platform(target) == "tpu":
        forward, backward = {"flash forward": encoder + llm}, {"flash backward": encoder + llm}
    else:
        forward = {"cuDNN forward": encoder, "Triton forward": llm}
        backward = {"cuDNN backward": encoder, "Triton backward": 2 * llm}
    if "step" not in name:
        backward = {}
    elif "remat full" in name:
        forward = {kernel: 2 * count for kernel, count in forward.items()}
    return {kernel: count for kernel, count in (forward | backward).items() if count}


def _place(name: str) -> str:
    """Of an operation's name, .../place/dot_general."""
    return name.rpartition("/")[0].rpartition("/")[2]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), cases(planted=False))
def test_program_is_compiled_as_meant(compiled, target, name):
    all_of_them = compiled(target)
    program = all_of_them.get(name, all_of_them[""])
    assert "error" not in program, program["error"]
    assert program["kernels"] == kernels(target, name)
    permitted = PERMITTED.get(name.split(":")[0], set())
    assert [one for one in program["float32"] if _place(one) not in permitted] == []
    assert program["host"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), cases(planted=True))
def test_what_must_not_be_is_seen(compiled, target, name):
    program = compiled(target)[name]
    match name.removeprefix("planted: "):
        case "float32":
            assert program["float32"] == ["jit(product)/dot_general"]
        case "callback":
            # For a GPU, JAX asks for the device that is to call, which is not here.
            assert program.get("host") == ["recv", "send"] or "Unknown backend: 'gpu'" in program["error"]
        case "off the mesh":
            assert "cannot be automatically partitioned" in program["error"]


def test_host_is_seen_in_programs_however_they_reach_it():
    text = """
  %done = (f32[8]{0}, token[]) infeed(%token)
  %out = token[] outfeed(%x, %token), outfeed_shape=f32[8]{0}
  %s = (f32[8], u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true
  %peer = (f32[8], u32[], token[]) send(%x, %token), channel_id=2
  %c = () custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback", api_version=API_VERSION_TYPED_FFI
  %m = f32[8]{0:T(128)S(5)} copy-start(%x)
  %n = f32[8]{0:T(128)S(1)} copy-start(%x)
"""
    assert facts.host(text) == ["S(5)", "infeed", "outfeed", "send", "xla_ffi_python_gpu_callback"]


def test_matrices_are_seen_where_they_are_written():
    text = """
%fused.1 (p: s8[8,4]) -> bf16[8,4] {
  ROOT %c = bf16[8,4]{1,0} convert(%p)
}

%body.2 (p: s8[8,4]) -> bf16[2,4] {
  %w = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%fused.1
  %t = bf16[1,4,8]{2,1,0} copy(%w)
  %s = s8[8,4]{1,0} copy(%p)
  %small = bf16[2,4]{1,0} dot(%x, %w)
}
"""
    assert [line.split()[0] for line in facts.written(text, ("bf16",), {(8, 4)})] == ["%w", "%t"]
