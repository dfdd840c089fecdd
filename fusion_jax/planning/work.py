"""Counts what a compiled program does: FLOPs of products, collectives, kernels and memory traffic.

Everything counts as often as the loops around it run:

    ENTRY main            x 1
      while body          x trip count, which the compiler writes beside the loop
        fusion            x 1 each
          convolution     2 x outputs x inputs that each of them sums over

XLA's own `cost_analysis` counts a loop's body once and sees nothing of kernels that are called by name
(`planning.kernels` knows those), so the text is read here. Only what matters for bounds is understood: a conditional
counts as its most expensive branch, and elementwise work is free.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusion_jax.planning.collectives import KINDS, Collective, bytes_sent, replica_groups
from fusion_jax.planning.hlo import Instruction, Module, Shape, parse
from fusion_jax.planning.products import convolution_flops, dot_flops
from fusion_jax.planning.traffic import hbm_bytes, only_sliced

_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|[\w$.]*triton[\w$.]*|__cudnn\$fmha\w*|__cublas\$[\w$]+)"')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel that computes products.

    Attributes:
      name: where in the model it is called. operands, results: their shapes. times: how often it runs in a step.
      target: the name that is called. rest: the rest of its line.
    """

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    times: float
    target: str
    rest: str = ""


@dataclass(frozen=True)
class Work:
    """The work of one chip in one step.

    Attributes:
      flops: FLOPs of the products that the text shows. hbm_bytes: bytes through HBM. collectives: each with the bytes
      that it sends. kernels: those that are called by name, whose FLOPs `planning.kernels` counts.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    """Returns the value of a constant integer, even if it is copied or converted; None if it is not constant."""
    instruction = computation[name]
    if instruction.op == "constant":
        return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
    if instruction.op in ("copy", "bitcast", "convert") and instruction.operands[0] in computation:
        return _constant(computation, instruction.operands[0])
    return None


def trips(module: Module, computation: dict[str, Instruction], loop: Instruction) -> float | None:
    """Returns how often a loop runs its body, None if only its data decides.

    The compiler mostly writes it beside the loop. Otherwise it is read from the condition, if that compares a
    counter, which starts at 0 as those of `lax.scan` do, with a constant of the condition or of the initial state.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return float(known[1])
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    root = next(one for one in condition.values() if one.root)
    operands = root.operands
    if root.op == "fusion":  # a comparison in a fusion of its own
        inner = module.computations[re.search(r"calls=%?([\w.\-]+)", root.rest)[1]]
        root = next(one for one in inner.values() if one.root)
        if any(inner[name].op != "parameter" for name in root.operands):
            return None
        operands = [operands[int(inner[name].operands[0])] for name in root.operands]
    if root.op != "compare" or "direction=LT" not in root.rest:
        return None
    limit = condition[operands[1]]
    value = _constant(condition, limit.name)
    if value is None and limit.op == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", limit.rest)[1])
        state = computation.get(loop.operands[0])
        if state is not None and state.op == "tuple":
            value = _constant(computation, state.operands[index])
    return None if value is None else float(value)


class _Counter:
    """Sums up the work of a program's computations."""

    def __init__(self, module: Module, devices: int, unknown_trips: Callable[[str], float]):
        self.module, self.devices, self.unknown_trips = module, devices, unknown_trips
        self.flops = self.hbm_bytes = 0.0
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []
        self._counted: dict[tuple[str, str], int] = {}  # places in `collectives`, by computation and channel

    def add(self, name: str, times: float, outer: str) -> None:
        """Adds a computation that runs `times` times in a step.

        Args:
          outer: the computation outside all fusions that this one is a part of: itself, unless a fusion calls it. What
            is inside a fusion moves no bytes through HBM; the fusion as a whole does, and is counted in `outer`.
        """
        computation = self.module.computations[name]
        for instruction in computation.values():
            operands = [computation[o] for o in instruction.operands if o in computation]
            if instruction.op == "while":
                self._add_loop(computation, instruction, times)
            elif instruction.op == "conditional":
                self._add_branches(instruction, times)
            else:
                self._add_instruction(computation, instruction, operands, times, outer, fused=name != outer)

    def _add_loop(self, computation: dict[str, Instruction], loop: Instruction, times: float) -> None:
        count = trips(self.module, computation, loop)
        body = re.search(r"body=%?([\w.\-]+)", loop.rest)[1]
        self.add(body, times * (self.unknown_trips(loop.rest) if count is None else count), body)

    def _add_branches(self, conditional: Instruction, times: float) -> None:
        """Adds the most expensive branch: other chips wait for one that takes it."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.rest)
        branches = []
        for name in names:
            branches.append(_Counter(self.module, self.devices, self.unknown_trips))
            branches[-1].add(name, times, name)
        most = max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes))
        self.flops += most.flops
        self.hbm_bytes += most.hbm_bytes
        self.collectives += most.collectives
        self.kernels += most.kernels

    def _add_instruction(
        self,
        computation: dict[str, Instruction],
        instruction: Instruction,
        operands: list[Instruction],
        times: float,
        outer: str,
        fused: bool,
    ) -> None:
        op, rest = instruction.op, instruction.rest
        if op == "convolution":
            self.flops += times * convolution_flops(instruction, operands[0].shapes[0], operands[1].shapes[0])
        elif op == "dot":
            self.flops += times * dot_flops(instruction, operands[0].shapes[0])
        elif op == "custom-call" and (target := _KERNEL.search(rest)):
            label = re.search(r'op_name="([^"]*)"', rest)
            name = f"{label[1] if label else ''} {instruction.name}"
            shapes = tuple(o.shapes[0] for o in operands if o.shapes)
            self.kernels.append(Kernel(name, shapes, instruction.shapes, times, target[1], rest))
        kind = op.removesuffix("-start")
        # How TPU programs write a reduce-scatter: a fusion that sums and keeps a slice, sent as the slices alone.
        if kind == "all-reduce" and fused and only_sliced(computation, instruction):
            kind = "reduce-scatter"
        if kind in KINDS:
            self._add_collective(kind, computation, instruction, operands, times, outer, fused)
        if op in ("fusion", "call", "async-start"):
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest):
                self.add(called, times, outer if fused or op == "fusion" else called)
        if not fused:
            self.hbm_bytes += times * hbm_bytes(self.module, instruction, operands)

    def _add_collective(
        self,
        kind: str,
        computation: dict[str, Instruction],
        instruction: Instruction,
        operands: list[Instruction],
        times: float,
        outer: str,
        fused: bool,
    ) -> None:
        # In a fusion it overlaps the products there; otherwise those between its start and its end.
        beside = computation.values() if fused else _while_it_runs(computation, instruction)
        exposed = not any(_computes(self.module, one) for one in beside)
        # A collective that is spread over several fusions, so that their products overlap it, is in each of them.
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = (outer, channel[1] if channel else instruction.name)
        if channel and key in self._counted:
            place = self._counted[key]
            if not exposed:
                self.collectives[place] = dataclasses.replace(self.collectives[place], exposed=False)
            return
        self._counted[key] = len(self.collectives)
        groups = replica_groups(instruction.rest, self.devices)
        size = 2 if kind == "collective-permute" else max(map(len, groups))
        part = sum(s.bytes for o in operands for s in o.shapes)
        whole = part * size if kind == "all-gather" else part
        sent = bytes_sent(kind, whole, size)
        self.collectives.append(Collective(kind, sent, groups, times, instruction.name, exposed))


def _while_it_runs(computation: dict[str, Instruction], start: Instruction) -> Iterator[Instruction]:
    """Yields the instructions between the start of an asynchronous collective and its end, in the program's order."""
    if not start.op.endswith("-start"):
        return
    following = itertools.dropwhile(lambda one: one is not start, computation.values())
    for one in itertools.islice(following, 1, None):
        if one.op.endswith("-done") and start.name in one.operands:
            return
        yield one


def _computes(module: Module, instruction: Instruction) -> bool:
    """Returns whether an instruction, or anything that it calls, is a product."""
    if instruction.op in ("dot", "convolution"):
        return True
    if instruction.op == "custom-call":
        return _KERNEL.search(instruction.rest) is not None
    if instruction.op not in ("fusion", "call", "while", "conditional"):
        return False
    called = re.findall(r"(?:calls|to_apply|body|\w+_computation)=%?([\w.\-]+)", instruction.rest)
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    called += re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
    return any(_computes(module, one) for name in called for one in module.computations[name].values())


def read(text: str, devices: int, unknown_trips: Callable[[str], float] | float = 1.0) -> Work:
    """Counts what one device does in one run of a program.

    Args:
      text: `compiled.as_text()`. devices: the number that it was compiled for.
      unknown_trips: how often a loop runs if only its data decides; a function is called with the rest of its line.

    Raises:
      ValueError: the text is not optimized HLO.
    """
    count = unknown_trips if callable(unknown_trips) else lambda _: float(unknown_trips)
    counter = _Counter(parse(text), devices, count)
    counter.add(counter.module.entry, 1.0, counter.module.entry)
    return Work(counter.flops, counter.hbm_bytes, tuple(counter.collectives), tuple(counter.kernels))
