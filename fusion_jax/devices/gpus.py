"""Describes NVIDIA GPUs: the figures of a card, how cards are connected, and what the compiler needs."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusion_jax.devices import peaks
from fusion_jax.errors import UserError, check

# Share of a card's memory that JAX takes for arrays and temporaries; launch/xla_flags.sh sets it for every GPU run. The
# rest is for CUDA, cuDNN and NCCL.
MEMORY_VARIABLE, MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.92
GPUS_IN_A_NODE = 8


@dataclass(frozen=True)
class Card:
    """Public figures of one GPU.

    Attributes:
      kind: JAX's name for it, by which `peaks.PEAKS` lists its FLOP/s. memory: bytes, as CUDA counts them;
      hbm_rate: bytes/s. nvlink, network: bytes/s of one GPU in one direction, inside its node and to other nodes.
      cores: streaming multiprocessors, with `units` float32 units each; capability: CUDA's, (major, minor).
      clock: GHz. l2, shared, block: bytes of level-2 cache, of a core's shared memory and of a block's share of that.
    """

    kind: str
    memory: int
    hbm_rate: float
    nvlink: float
    network: float
    capability: tuple[int, int]
    cores: int
    units: int
    clock: float
    l2: int
    shared: int
    block: int

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16, dense."""
        return peaks.datasheet_peak(self.kind)

    @property
    def hbm(self) -> float:
        """Bytes that a program may use."""
        return self.memory * memory_share()


# The memory, its rate and NVLink are from NVIDIA's datasheets (A100: 600 GB/s of NVLink both ways; H100 SXM, H200 900
# GB/s; B200 1,800 GB/s). The network is that of NVIDIA's own machines: one 200 Gbit/s adapter per GPU in a DGX A100,
# one of 400 Gbit/s in DGX H100, H200 and B200.
# Cores, caches and the bytes of memory that CUDA reports are from XLA's descriptions of these devices
# (openxla/xla, xla/backends/gpu/target_config/specs).
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", 85100068864, 2039e9, 300e9, 25e9,
        (8, 0), 108, 64, 1.41, 41943040, 167936, 166912,
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", 84942979072, 3352e9, 450e9, 50e9,
        (9, 0), 132, 128, 1.98, 52428800, 233472, 232448,
    ),
    "h200": Card(
        "NVIDIA H200", 151397597184, 4800e9, 450e9, 50e9,
        (9, 0), 132, 128, 1.98, 52428800, 233472, 232448,
    ),
    "b200": Card(
        "NVIDIA B200", 191514411008, 7672e9, 900e9, 50e9,
        (10, 0), 148, 128, 1.965, 132644864, 233472, 232448,
    ),
}  # fmt: skip
KNOWN = ", ".join(CARDS)


def memory_share() -> float:
    """Returns the share of a card's memory that JAX takes here.

    Raises:
      UserError: the environment variable is not a share.
    """
    text = os.environ.get(MEMORY_VARIABLE, str(MEMORY_SHARE))
    check(
        re.fullmatch(r"0?\.\d+|1(\.0*)?", text) is not None, f"{MEMORY_VARIABLE}={text} is not a share, such as 0.92."
    )
    return float(text)


def description(card: Card) -> str:
    """Describes the card to the compiler: a GpuTargetConfigProto as text."""
    # Instructions that only this one architecture has; the drivers of real cards report them.
    extension = "feature_extension: ACCELERATED_FEATURES" if card.capability >= (9, 0) else ""
    # The versions of the toolkit and of cuDNN that come with JAX.
    toolkit = (13, 0) if importlib.util.find_spec("jax_cuda13_plugin") else (12, 9)
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {card.shared} shared_memory_per_block_optin: {card.block}
  core_count: {card.cores} fpus_per_core: {card.units} clock_rate_ghz: {card.clock} l2_cache_size: {card.l2}
  device_memory_size: {card.memory} memory_bandwidth: {int(card.hbm_rate)}
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} {extension} }}
}}
platform_name: "CUDA" device_description_str: "{card.kind}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: {toolkit[0]} minor: {toolkit[1]} }}
"""


@dataclass(frozen=True)
class GpuTopology:
    """GPUs of one kind in nodes: h100:8 is one node of eight GPUs, h100:8x4 four such nodes.

    JAX calls nodes slices: cards that are connected directly.
    """

    name: str

    noun = "GPU"

    def __post_init__(self):
        kind, _, shape = self.name.partition(":")
        good = kind in CARDS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", shape) is not None
        check(
            good and self.sides[0] <= GPUS_IN_A_NODE,
            f"--topology={self.name} is unknown; GPUs are written as kind:GPUS or kind:GPUSxNODES with at most "
            f"{GPUS_IN_A_NODE} GPUs in a node, such as h100:8x4, of the kinds {KNOWN}.",
        )

    @property
    def chip(self) -> Card:
        return CARDS[self.name.split(":")[0]]

    @property
    def sides(self) -> tuple[int, int]:
        """(GPUs in a node, nodes)."""
        sides = [int(side) for side in self.name.split(":")[1].split("x")]
        return sides[0], sides[1] if len(sides) > 1 else 1

    @property
    def slices(self) -> int:
        return self.sides[1]

    @property
    def chips(self) -> int:
        return self.sides[0] * self.sides[1]

    @property
    def limit(self) -> float:
        """Bytes that a program may take on one GPU; the compiler itself refuses nothing."""
        return self.chip.hbm

    @property
    def memory_note(self) -> str:
        return f" ({memory_share():.0%} of the card's {self.chip.memory / 2**30:.1f}, {MEMORY_VARIABLE})"

    @property
    def options(self) -> dict[str, bool]:
        """Options for the compiler, the same as in launch/xla_flags.sh."""
        return {"xla_gpu_enable_latency_hiding_scheduler": True}

    def devices(self) -> list:
        """Descriptions of all GPUs for the compiler.

        Raises:
          UserError: the compiler is not installed.
        """
        if all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13)):
            raise UserError(
                "Planning for GPUs compiles with JAX's CUDA plug-in, which is not installed: "
                "pip install -e '.[plan_gpu]'."
            )
        # Without this the plug-in would ask for the driver's version and give up.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        from jax.experimental import topologies

        gpus, nodes = self.sides
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description(self.chip), topology=f"{nodes}x1x{gpus}"
        )
        return list(topology.devices)

    def seconds(self, kind: str, sent: float, group: Sequence) -> float:
        """Returns the least time of a collective, in seconds.

        Inside a node everything goes over NVLink. Between nodes, what a node has to send goes through the adapters of
        all its members at once; in an all-to-all each member has to send its own part.

        Args:
          kind: such as all-gather. sent: bytes that each device sends. group: the devices that take part.
        """
        nodes = len({device.slice_index for device in group})
        inside = sent / self.chip.nvlink
        if nodes == 1:
            return inside
        members = len(group)
        if kind == "collective-permute":
            return sent / self.chip.network
        # `sent` is (members - 1) / members of the whole, once or twice; (nodes - 1) / nodes of the whole leave a node.
        share = (nodes - 1) / (members - 1) * (members / nodes if kind == "all-to-all" else 1)
        return max(inside, sent * share / self.chip.network)
