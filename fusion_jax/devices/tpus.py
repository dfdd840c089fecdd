"""Describes TPUs: the figures of a chip, the topologies that exist, and what the compiler needs."""

import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion_jax.devices import peaks
from fusion_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Public figures of one chip.

    Attributes:
      kind: JAX's name for it, by which `peaks.PEAKS` lists its FLOP/s. hbm: bytes; hbm_rate: bytes/s. link:
      bytes/s of one link of the torus in one direction, two links along each dimension. dcn: bytes/s of the data
      centre's network. ring: the ends of a dimension are joined if its length is a multiple of this. shapes: those
      that a slice may have.
    """

    kind: str
    hbm: float
    hbm_rate: float
    link: float
    dcn: float
    ring: int
    shapes: tuple[str, ...]

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16."""
        return peaks.datasheet_peak(self.kind)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# v5e and v5p are from the vendor's pages (docs.cloud.google.com/tpu/docs, read in 2026); v6e's are still to be checked
# there, as is how v5e's interconnect divides over its links. The interconnect is published for a chip as a whole: v5e
# 1,600 Gbit/s each way over 4 links, v5p 1,200 GB/s both ways over 6, v6e 800 GB/s both ways over 4. The network
# between slices has 6.4 Tbit/s for 256 v5e chips, 50 Gbit/s per v5p chip, 100 Gbit/s per v6e chip.
CHIPS = {
    "v5e": Chip("TPU v5e", 16e9, 819e9, 50e9, 3.1e9, 16, _FLAT),
    "v5p": Chip("TPU v5p", 95 * 2**30, 2765e9, 100e9, 6.2e9, 4, _CUBES),
    "v6e": Chip("TPU v6e", 32e9, 1640e9, 100e9, 12.5e9, 16, _FLAT),
}
KNOWN = tuple(f"{generation}:{shape}" for generation, chip in CHIPS.items() for shape in chip.shapes)


def shapes() -> str:
    """Lists all topologies of all generations, for messages."""
    return "; ".join(f"{generation}: {', '.join(chip.shapes)}" for generation, chip in CHIPS.items())


@dataclass(frozen=True)
class TpuTopology:
    """A slice of chips, named as in v5p:4x4x8, or several such slices joined by the data centre's network."""

    name: str
    slices: int = 1

    noun = "chip"
    memory_note = ""

    def __post_init__(self):
        if self.name not in KNOWN:
            raise UserError(f"--topology={self.name} is unknown; known ones, as generation:shape, are {shapes()}.")
        if self.slices < 1:
            raise UserError(f"--slices={self.slices} must be at least 1.")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.split(":")[0]]

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(map(int, self.name.split(":")[1].split("x")))

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices

    @property
    def limit(self) -> None:
        """None: the compiler knows how much memory a program may take, and refuses one that does not fit."""
        return None

    @property
    def options(self) -> dict[str, bool]:
        """Options for the compiler beyond those that training gives it: none."""
        return {}

    def devices(self) -> list:
        """Descriptions of all chips for the compiler.

        Raises:
          UserError: the compiler is not installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("Planning compiles with libtpu, which is not installed: pip install -e '.[plan]'.")
        # There is no TPU to query, nor one that only one process may hold.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # Without these it complains that the machine has no TPU; their values do not matter for compiling.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
        from jax.experimental import topologies

        arguments = {"num_slices": self.slices} if self.slices > 1 else {}
        topology = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **arguments)
        return list(topology.devices)

    def seconds(self, kind: str, sent: float, group: Sequence) -> float:
        """Returns the least seconds of a collective in which each device of a group sends `sent` bytes."""
        del kind
        links = self.links(group)
        return sent / (links * self.chip.link if links else self.chip.dcn)

    def links(self, group: Sequence) -> float:
        """Returns the number of links into a chip that a collective can use at once, 0 if its group leaves the slice.

        There are two for each dimension of the torus along which the group spreads, one if its ends are not joined.
        """
        if len({getattr(device, "slice_index", None) or 0 for device in group}) > 1:
            return 0
        return sum(self._links(dim, places) for dim, places in enumerate(zip(*(d.coords for d in group))))

    def _links(self, dim: int, places: Iterable[int]) -> int:
        spread = len(set(places))
        if spread == 1:
            return 0
        side = self.sides[dim]
        return 2 if spread == side and side % self.chip.ring == 0 else 1
