"""Tests that a shell can evaluate the compiler flags, and that their compilers know them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "xla_flags.sh"
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def exported(kind, **already):
    """Returns the variables after `eval "$(bash launch/xla_flags.sh KIND)"` in a shell that has `already`."""
    names = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "TPU_ACCELERATOR_TYPE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    lines = "; ".join(f'echo "{name}=${{{name}:-}}"' for name in names[:3])
    command = ["bash", "-c", f'set -e; eval "$(bash {SCRIPT} {kind})"; {lines}']
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | already).stdout
    return {line.split("=")[0]: line.partition("=")[2] for line in out.splitlines() if line.partition("=")[2]}


def test_what_the_user_set_is_kept_and_stands_last():
    flags = exported("v6e", LIBTPU_INIT_ARGS="--a=1 --b=2")["LIBTPU_INIT_ARGS"].split()
    assert len(flags) > 2 and flags[-2:] == ["--a=1", "--b=2"]
    assert exported("gpu", XLA_FLAGS="--a=1")["XLA_FLAGS"].split()[-1] == "--a=1"
    assert exported("gpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert exported("none") == {}


def test_the_machine_is_recognised():
    assert exported("auto", TPU_ACCELERATOR_TYPE="v6e-8") == exported("v6e") != {}
    assert exported("auto", TPU_ACCELERATOR_TYPE="v5litepod-16") == exported("v5e")


def test_gpu_flags_are_known_to_this_jaxlib():
    def run(flags):
        code = "import jax; jax.numpy.zeros(1).block_until_ready()"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    result = run(exported("gpu")["XLA_FLAGS"])
    assert result.returncode == 0, result.stderr[-500:]
    assert "Unknown flag" in run("--xla_gpu_no_such_flag=true").stderr  # jaxlib still checks them


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_tpu_flags_are_known_to_libtpu(kind):
    code = f"""
from jax.experimental import topologies
import jax
topology = topologies.get_topology_desc(platform="tpu", topology_name="{TOPOLOGIES[kind]}")
sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=sharding)
jax.jit(lambda x: x @ x).lower(x).compile()
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"LIBTPU_INIT_ARGS": exported(kind).get("LIBTPU_INIT_ARGS", "")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-500:]
