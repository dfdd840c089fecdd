"""Counts the bytes that each instruction of a compiled program reads from and writes to HBM."""

import itertools
import re

from fusion_jax.planning.hlo import Instruction, Module

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id", "while"}
_FREE |= {"replica-id", "call", "conditional", "custom-call-start", "optimization-barrier"}

_SLICES = {"slice", "dynamic-slice"}


def hbm_bytes(module: Module, instruction: Instruction, operands: list[Instruction]) -> float:
    """Returns the bytes that one run of an instruction outside fusions moves; a loop or call itself moves none."""
    op = instruction.op
    if op in _FREE or op.endswith("-done") or op.endswith("-start"):
        return 0.0
    results = sum(s.bytes for s in instruction.shapes if s.in_hbm)
    if op in _SLICES:
        return 2 * results
    if op == "dynamic-update-slice":
        return 2 * operands[1].shapes[0].bytes
    read = [sum(s.bytes for s in o.shapes if s.in_hbm) for o in operands]
    if op == "fusion":
        return _fusion_bytes(module, instruction, read, results)
    return results + sum(read)


def _fusion_bytes(module: Module, instruction: Instruction, read: list[float], results: float) -> float:
    """Returns a fusion's bytes: if it only uses a slice of an operand or updates a slice, only the slice counts.

    Args:
      read: bytes of each operand. results: bytes of its results.
    """
    name = re.search(r"calls=%?([\w.\-]+)", instruction.rest)[1]
    inner = module.computations[name]
    readers = users(inner)
    for one in inner.values():
        if one.op != "parameter" or int(one.operands[0]) >= len(read):
            continue
        number, uses = int(one.operands[0]), through_bitcasts(readers, one.name)
        if uses and all(use.op in _SLICES for use in uses):
            read[number] = min(read[number], sum(use.shapes[0].bytes for use in uses))
        elif uses and all(use.op == "dynamic-update-slice" for use in uses):
            written = sum(inner[use.operands[1]].shapes[0].bytes for use in uses)
            results -= min(results, read[number]) - min(written, read[number])
            read[number] = 0.0
    return max(results, 0.0) + sum(read)


def users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """Returns the instructions of a computation that read each name."""
    readers: dict[str, list[Instruction]] = {}
    for one in computation.values():
        for operand in one.operands:
            readers.setdefault(operand, []).append(one)
    return readers


def only_sliced(computation: dict[str, Instruction], instruction: Instruction) -> bool:
    """Returns whether only slices of an instruction's result are used."""
    uses = through_bitcasts(users(computation), instruction.name)
    return bool(uses) and all(use.op == "dynamic-slice" for use in uses)


def through_bitcasts(readers: dict[str, list[Instruction]], name: str) -> list[Instruction]:
    """Returns the instructions that read a name, itself or through bitcasts; `readers` is from `users`."""
    return list(
        itertools.chain.from_iterable(
            through_bitcasts(readers, use.name) if use.op == "bitcast" else [use] for use in readers.get(name, [])
        )
    )
