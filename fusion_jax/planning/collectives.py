"""Describes the collectives of a compiled program: kinds, groups of devices, and the bytes they send."""

import math
import re
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective and how often it runs in a step.

    Attributes:
      kind: one of KINDS. bytes: bytes that a chip sends (and receives) in one run. groups: devices that take part
      together, by their indices in the list that the program was compiled for. exposed: whether the compiled program
      runs no product beside it, so that its time adds to that of the products.
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    times: float
    name: str
    exposed: bool


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Reads the groups of a collective from the rest of its line, which writes them in one of three ways.

    {{0,1},{2,3}}                                     every group
    [2,2]<=[2,2]T(1,0)                                rows of an array: 0, 1, ... in a shape, transposed, reshaped
    mesh['a'=2,'b'=2], device_ids=([4]) {'b'}         along an axis of a mesh; 'a':(1)2 is a part of an axis
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    if mesh:
        return _along_axes(*mesh.groups())
    array = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if array:
        rows = _counted(array[2]).reshape([int(x) for x in array[1].split(",")])
        return tuple(map(tuple, rows.tolist()))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    return tuple(tuple(map(int, g.split(","))) for g in groups) or (tuple(range(devices)),)


def _counted(text: str) -> np.ndarray:
    """Returns the numbers of `[4,2]T(1,0)`: from 0 in that shape, its dimensions transposed, then flattened."""
    shape, turn = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    dims = [int(x) for x in shape.split(",")]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose([int(x) for x in turn.split(",")]) if turn else numbers).ravel()


def _along_axes(axes: str, order: str | None, along: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    # Cut every axis into the parts that are named: (before, part, after).
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    shape, places = [], {}
    for name, size in sizes.items():
        done = 1
        for i, (of, before, part) in enumerate(wanted):
            if of != name:
                continue
            before, part = int(before or 1), int(part or size)
            shape.append(before // done)
            places[i] = len(shape)
            shape.append(part)
            done = before * part
        shape.append(size // done)
    numbers = _counted(order) if order else np.arange(math.prod(sizes.values()))
    chosen = [places[i] for i in range(len(wanted))]
    rows = np.moveaxis(numbers.reshape(shape), chosen, range(-len(chosen), 0))
    return tuple(map(tuple, rows.reshape(-1, math.prod(shape[k] for k in chosen)).tolist()))


def bytes_sent(kind: str, whole: float, group: int) -> float:
    """Returns the bytes that a chip sends in a ring of `group` chips.

    Args:
      kind: one of KINDS. whole: bytes of the larger side, that is of all that is gathered, reduced or exchanged.
    """
    share = (group - 1) / group
    return {"all-reduce": 2 * whole * share, "collective-permute": whole}.get(kind, whole * share)
