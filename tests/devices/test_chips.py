"""Chips to plan for: their topologies and memory, how long collectives take on them, and what is refused."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion_jax.devices import gpus
from fusion_jax.devices.chips import topology
from fusion_jax.devices.tpus import CHIPS, KNOWN
from fusion_jax.errors import UserError


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
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=75 is not a share"):
        gpus.memory_share()


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


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install fusion_jax\[plan\]"):
        topology("v5e:2x2").devices()
    with pytest.raises(UserError, match=r"pip install fusion_jax\[plan-gpu\]"):
        topology("h100:8").devices()
