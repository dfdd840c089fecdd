"""What a compiled program does, read from its optimized HLO: products, collectives and memory traffic, each as often as
its loops go round.

    ENTRY main            x 1
      while body          x trip count, which the compiler writes beside the loop
        fusion            x 1 each
          convolution     2 x outputs x inputs that each of them sums over

XLA's own `cost_analysis` counts a loop's body once and sees nothing of kernels that are called by name
(`planning.kernels` knows those); hence this. Only what matters
for bounds is understood: a conditional counts its dearest branch, elementwise work is free.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|[\w$.]*triton[\w$.]*|__cudnn\$fmha\w*|__cublas\$[\w$]+)"')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclass(frozen=True)
class Shape:
    """An array: dtype, dimensions, and whether it lies in HBM (and not in a memory space on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Instruction:
    """One line: `shapes` of its result (several for a tuple), names of its operands (of a parameter its number, of a
    constant its value), the rest of the line."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclass(frozen=True)
class Module:
    """Computations by name, each a dict of instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclass(frozen=True)
class Collective:
    """One collective and how often it runs in a step.

    Attributes:
      kind: of KINDS. bytes: that a chip sends (and receives) in one run. groups: devices that take part together, by
      their places in the list that the program was compiled for.
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    times: float
    name: str


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel that computes products: its target and name, shapes of operands and results, how often it
    runs, the rest of its line."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    times: float
    target: str
    rest: str = ""


@dataclass(frozen=True)
class Work:
    """Of one chip in one step: FLOPs of products that the text shows, bytes through HBM, collectives, kernels called by
    name."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(map(int, dims.split(","))) if dims else (), not re.search(r"S\([1-9]", layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
        if dtype in _BYTES
    )


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets in HLO: {text[:200]}")


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if not found:
        return None
    text = line[found.end() :]
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    op = re.match(r"([\w\-]+)\(", text)
    if not op:
        return None
    close = _closing(text, op.end() - 1)
    inside = text[op.end() : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if op[1] in ("parameter", "constant"):
        operands = (inside.strip(),)
    return Instruction(found[2], op[1], _shapes(kind), operands, text[close + 1 :], bool(found[1]))


def _lines(text: str) -> Iterator[str]:
    """Lines of instructions, headers and ends; an instruction whose attributes hold line breaks is one line."""
    whole = ""
    for line in text.splitlines():
        if _NAME.match(line) or _HEADER.match(line) or line == "}":
            yield whole
            whole = line
        else:
            whole += " " + line
    yield whole


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations, entry, current = {}, "", None
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it optimized HLO?")
    return Module(computations, entry)


# Products.


def _positions(out: int, size: int, stride: int, low: int, length: int, base: int, dilation: int) -> int:
    """Pairs (output place, window place) that fall on a real input, along one spatial dimension."""
    places = np.arange(out)[:, None] * stride - low + np.arange(size)[None] * dilation
    reach = (length - 1) * base + 1
    return int(((places >= 0) & (places < reach) & (places % base == 0)).sum())


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """TPU programs write every product as a convolution, batched ones with windows over the batch."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    lhs, rhs, out = labels.groups()
    spatial = sorted(set(out) - {"b", "f"})
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def each(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    sizes, strides, pads = each("size", "1"), each("stride", "1"), each("pad", "0_0")
    bases, dilations = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    result = instruction.shapes[0].dims
    pairs = 1
    for k, label in enumerate(spatial):
        pairs *= _positions(
            result[out.index(label)],
            int(sizes[k]),
            int(strides[k]),
            int(pads[k].split("_")[0]),
            left.dims[lhs.index(label)],
            int(bases[k]),
            int(dilations[k]),
        )
    batch, features = result[out.index("b")], result[out.index("f")]
    # With groups of features the kernel has the inputs of one group; with groups of batches the result is smaller.
    return 2.0 * batch * features * pairs * right.dims[rhs.index("i")]


def _dot_flops(instruction: Instruction, left: Shape) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    dims = [int(d) for d in contracted[1].split(",") if d]
    return 2.0 * instruction.shapes[0].size * math.prod(left.dims[d] for d in dims)


# Collectives.


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective from the rest of its line, which writes them in one of three ways.

    {{0,1},{2,3}}                                     every group
    [2,2]<=[2,2]T(1,0)                                rows of an array: numbers counted up, turned, cut into rows
    mesh['a'=2,'b'=2], device_ids=([4]) {'b'}         along an axis of a mesh; 'a':(1)2 is a part of an axis
    """
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    if found:
        return _along_axes(*found.groups())
    found = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if found:
        rows = _counted(found[2]).reshape([int(x) for x in found[1].split(",")])
        return tuple(map(tuple, rows.tolist()))
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = re.findall(r"\{([\d,]+)\}", found[1]) if found else []
    return tuple(tuple(map(int, g.split(","))) for g in groups) or (tuple(range(devices)),)


def _counted(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 in that shape, its dimensions then turned; flat."""
    shape, turn = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    dims = [int(x) for x in shape.split(",")]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose([int(x) for x in turn.split(",")]) if turn else numbers).ravel()


def _along_axes(axes: str, order: str | None, along: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    # Every axis cut into the parts that are named: (before, part, after).
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


def _sent(kind: str, whole: float, group: int) -> float:
    """Bytes that a chip sends in a ring; `whole` is the larger side: what is gathered, reduced or exchanged."""
    share = (group - 1) / group
    return {"all-reduce": 2 * whole * share, "collective-permute": whole}.get(kind, whole * share)


# All of it.


def _constant(module: Module, computation: dict[str, Instruction], name: str) -> int | None:
    """The value of an integer that is constant, through copies and what converts it; None if it is not."""
    found = computation[name]
    if found.op == "constant":
        return int(found.operands[0]) if re.fullmatch(r"-?\d+", found.operands[0]) else None
    if found.op in ("copy", "bitcast", "convert") and found.operands[0] in computation:
        return _constant(module, computation, found.operands[0])
    return None


def trips(module: Module, computation: dict[str, Instruction], loop: Instruction) -> float | None:
    """How often a loop goes round: as the compiler says, or, as `lax.scan` counts, from 0 by 1 up to a constant of its
    condition or of its initial state. None where neither is so."""
    known = _TRIPS.search(loop.rest)
    if known:
        return float(known[1])
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    root = next(one for one in condition.values() if one.root)
    operands = root.operands
    if root.op == "fusion":  # a comparison wrapped on its own
        inner = module.computations[re.search(r"calls=%?([\w.\-]+)", root.rest)[1]]
        root = next(one for one in inner.values() if one.root)
        if any(inner[name].op != "parameter" for name in root.operands):
            return None
        operands = [operands[int(inner[name].operands[0])] for name in root.operands]
    if root.op != "compare" or "direction=LT" not in root.rest:
        return None
    limit = condition[operands[1]]
    value = _constant(module, condition, limit.name)
    if value is None and limit.op == "get-tuple-element":
        place = int(re.search(r"index=(\d+)", limit.rest)[1])
        state = computation.get(loop.operands[0])
        if state is not None and state.op == "tuple":
            value = _constant(module, computation, state.operands[place])
    return None if value is None else float(value)


class _Reader:
    def __init__(self, module: Module, devices: int, trips: Callable[[str], float]):
        self.module, self.devices, self.unknown_trips = module, devices, trips
        self.flops = self.hbm_bytes = 0.0
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []
        self.seen: set[tuple[str, str]] = set()

    def walk(self, name: str, times: float, outer: str) -> None:
        """Counts a computation that runs so often as part of `outer`, itself where it is no fusion's."""
        computation = self.module.computations[name]
        for instruction in computation.values():
            self._count(computation, instruction, times, outer, fused=name != outer)

    def _count(self, computation, instruction: Instruction, times: float, outer: str, fused: bool) -> None:
        op, rest = instruction.op, instruction.rest
        operands = [computation[o] for o in instruction.operands if o in computation]
        if op == "while":
            rounds = trips(self.module, computation, instruction)
            body = re.search(r"body=%?([\w.\-]+)", rest)[1]
            self.walk(body, times * (self.unknown_trips(rest) if rounds is None else rounds), body)
            return
        if op == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
            branches = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
            # The dearest: a chip waits for whoever takes it.
            readers = [self._apart(branch, times) for branch in branches]
            best = max(readers, key=lambda r: (r.flops, r.hbm_bytes))
            self._add(best)
            return
        if op == "convolution":
            self.flops += times * _convolution_flops(instruction, operands[0].shapes[0], operands[1].shapes[0])
        elif op == "dot":
            self.flops += times * _dot_flops(instruction, operands[0].shapes[0])
        elif op == "custom-call" and (target := _KERNEL.search(rest)):
            label = re.search(r'op_name="([^"]*)"', rest)
            self.kernels.append(
                Kernel(
                    f"{label[1] if label else ''} {instruction.name}",
                    tuple(o.shapes[0] for o in operands if o.shapes),
                    instruction.shapes,
                    times,
                    target[1],
                    rest,
                )
            )
        kind = op.removesuffix("-start")
        # How TPU programs write a reduce-scatter: a fusion that sums and keeps a slice, sent as the slices alone.
        if kind == "all-reduce" and fused and _only_sliced(computation, instruction):
            kind = "reduce-scatter"
        if kind in KINDS:
            self._collective(kind, instruction, operands, times, outer)
        if op in ("fusion", "call", "async-start"):
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest):
                self.walk(called, times, outer if fused or op == "fusion" else called)
        if not fused:
            self.hbm_bytes += times * self._traffic(instruction, operands)

    def _apart(self, name: str, times: float) -> "_Reader":
        other = _Reader(self.module, self.devices, self.unknown_trips)
        other.walk(name, times, name)
        return other

    def _add(self, other: "_Reader") -> None:
        self.flops += other.flops
        self.hbm_bytes += other.hbm_bytes
        self.collectives += other.collectives
        self.kernels += other.kernels

    def _collective(self, kind: str, instruction: Instruction, operands, times: float, outer: str) -> None:
        # One that is spread over several fusions, to be hidden behind their products, stands in each of them.
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if channel and (outer, channel[1]) in self.seen:
            return
        self.seen.add((outer, channel[1] if channel else instruction.name))
        groups = replica_groups(instruction.rest, self.devices)
        size = 2 if kind == "collective-permute" else max(map(len, groups))
        given = sum(s.bytes for o in operands for s in o.shapes)
        whole = given * size if kind == "all-gather" else given
        self.collectives.append(Collective(kind, _sent(kind, whole, size), groups, times, instruction.name))

    # Bytes through HBM of one instruction outside fusions: what it reads and what it writes.

    def _traffic(self, instruction: Instruction, operands: list[Instruction]) -> float:
        op = instruction.op
        if op in _FREE or op.endswith("-done") or op.endswith("-start"):
            return 0.0
        results = sum(s.bytes for s in instruction.shapes if s.in_hbm)
        if op == "dynamic-slice":
            return 2 * results
        if op == "dynamic-update-slice":
            return 2 * operands[1].shapes[0].bytes
        read = [sum(s.bytes for s in o.shapes if s.in_hbm) for o in operands]
        if op == "fusion":
            return self._fusion_traffic(instruction, read, results)
        return results + sum(read)

    def _fusion_traffic(self, instruction: Instruction, read: list[float], results: float) -> float:
        """A fusion that only takes a slice of an operand reads no more; one that updates a slice writes no more."""
        name = re.search(r"calls=%?([\w.\-]+)", instruction.rest)[1]
        inner = self.module.computations[name]
        users = _users(inner)
        for one in inner.values():
            if one.op != "parameter" or int(one.operands[0]) >= len(read):
                continue
            place, uses = int(one.operands[0]), _through_bitcasts(users, one.name)
            if uses and all(use.op == "dynamic-slice" for use in uses):
                read[place] = min(read[place], sum(use.shapes[0].bytes for use in uses))
            elif uses and all(use.op == "dynamic-update-slice" for use in uses):
                written = sum(inner[use.operands[1]].shapes[0].bytes for use in uses)
                results -= min(results, read[place]) - min(written, read[place])
                read[place] = 0.0
        return max(results, 0.0) + sum(read)


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id", "while"}
_FREE |= {"replica-id", "call", "conditional", "custom-call-start", "optimization-barrier"}


def _users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for one in computation.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    return users


def _only_sliced(computation: dict[str, Instruction], instruction: Instruction) -> bool:
    uses = _through_bitcasts(_users(computation), instruction.name)
    return bool(uses) and all(use.op == "dynamic-slice" for use in uses)


def _through_bitcasts(users: dict[str, list[Instruction]], name: str) -> list[Instruction]:
    return list(
        itertools.chain.from_iterable(
            _through_bitcasts(users, use.name) if use.op == "bitcast" else [use] for use in users.get(name, [])
        )
    )


def read(text: str, devices: int, unknown_trips: Callable[[str], float] | float = 1.0) -> Work:
    """What one device does in one run of a program.

    Args:
      text: `compiled.as_text()`. devices: that it was compiled for.
      unknown_trips: rounds of a loop whose count only its data decides; a function gets the rest of the loop's line.
    """
    trips = unknown_trips if callable(unknown_trips) else lambda _: float(unknown_trips)
    reader = _Reader(parse(text), devices, trips)
    reader.walk(reader.module.entry, 1.0, reader.module.entry)
    return Work(reader.flops, reader.hbm_bytes, tuple(reader.collectives), tuple(reader.kernels))
