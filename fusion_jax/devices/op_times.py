"""Sums the events of a profiler's trace of steps by operation and by kind, to show what takes time.

On a GPU an event is one kernel on one stream; on a CPU, which has no kernels, one instruction of the compiled program.
"""

import collections
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

# Kinds by patterns in the names of the kernel and the instruction; the first that matches counts.
KINDS = (
    ("between devices", r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective"),
    ("cuDNN attention", r"cudnn|sdpa|flash_?(fprop|bprop)|fort_native"),
    ("Triton attention", r"segment_flash|flash_attention|__triton\$|pallas"),
    ("Triton product", r"gemm_fusion|triton_(gemm|softmax_gemm)|nested_gemm"),
    ("CPU attention", r"ffi_call"),
    ("YNNPACK product", r"ynn_fusion"),  # of a CPU
    ("cuBLAS product", r"nvjet|gemm|gemv|cublas|cutlass|xmma|splitk|^dot"),
    ("copy", r"memcpy|memset|copy|transpose|concatenate|slice|\bpad\b"),
    ("gather or scatter", r"scatter|gather|sort|select_and"),
    ("reduction", r"reduc|softmax"),
    ("elementwise", r"fusion|convert|add|multiply|loop|broadcast|select|wrapped"),
)
_LOOPS = re.compile(r"(while|call|conditional)(\.\d+)?$")  # the instructions in their bodies have events of their own
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.MULTILINE)


@dataclass(frozen=True)
class Event:
    """One run of an operation: the kernel's name, the program's instruction, and start and end in nanoseconds."""

    name: str
    operation: str
    start: float
    end: float


def kind(name: str, operation: str) -> str:
    """Returns the kind of an operation: one of `KINDS`, or `other`."""
    both = f"{name} {operation}".lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, both)), "other")


def read(folder: str | Path) -> list[Event]:
    """Reads the events of one device from the newest trace that `jax.profiler` wrote under `folder`.

    Raises:
      FileNotFoundError: there is no trace.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no trace (*.xplane.pb) under {folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes}
        devices = sorted(name for name in planes if name.startswith("/device:GPU"))
        if devices:
            return list(_kernels(planes[devices[0]]))
        return list(_instructions(planes["/host:CPU"])) if "/host:CPU" in planes else []


def _kernels(plane) -> Iterator[Event]:
    # Lines other than streams (steps, modules, name scopes) repeat the same events.
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")] or lines
    for line in streams:
        for event in line.events:
            stats = dict(event.stats)
            yield Event(
                event.name, str(stats.get("hlo_op", "")), event.start_ns, event.start_ns + max(event.duration_ns, 0)
            )


def _instructions(plane) -> Iterator[Event]:
    for line in plane.lines:
        if line.name == "python":
            continue
        for event in line.events:
            operation = dict(event.stats).get("hlo_op")
            if operation and not _LOOPS.match(str(operation)):
                yield Event(event.name, str(operation), event.start_ns, event.start_ns + event.duration_ns)


def busy(events: list[Event]) -> float:
    """Returns the nanoseconds in which at least one of the events was running."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def sources(program: str) -> dict[str, str]:
    """Maps each instruction of a compiled program, by `_symbol`, to where it comes from in the model (`op_name`)."""
    return {_symbol(name): source for name, source in _INSTRUCTION.findall(program)}


def _symbol(instruction: str) -> str:
    """Returns an instruction's name as it appears in the name of its kernel."""
    return re.sub(r"[.\-]", "_", instruction)


def summary(events: list[Event], steps: int, program: str = "", dearest: int = 15) -> dict:
    """Sums up the milliseconds per step, by kind and by operation.

    Args:
      steps: how many the trace holds. program: the compiled program's text, which says where instructions come from.
      dearest: how many operations to list.

    Returns:
      span_ms: time per step, first to last event. busy_share: the share of it in which at least one event runs.
      kinds and dearest: lists of rows, the most expensive first; their `share` is of the span.
    """
    if not events:
        return {"span_ms": 0.0, "busy_share": 0.0, "kinds": [], "dearest": []}
    span = max(e.end for e in events) - min(e.start for e in events)
    where = sources(program)
    by_kind: dict[str, float] = collections.Counter()
    by_operation: dict[tuple[str, str], float] = collections.Counter()
    calls: dict[tuple[str, str], int] = collections.Counter()
    for event in events:
        key = (event.operation or event.name, event.name)
        by_kind[kind(event.name, event.operation)] += event.end - event.start
        by_operation[key] += event.end - event.start
        calls[key] += 1

    def row(time: float) -> dict:
        return {"ms": round(time / steps / 1e6, 3), "share": round(time / span, 4)}

    return {
        "span_ms": round(span / steps / 1e6, 3),
        "busy_share": round(busy(events) / span, 4),
        "kinds": [{"kind": name, **row(time)} for name, time in by_kind.most_common()],
        "dearest": [
            {
                "operation": operation,
                "kind": kind(name, operation),
                **row(time),
                "calls": round(calls[operation, name] / steps, 1),
                "kernel": name[:80],
                "source": _short(where.get(_symbol(operation), "")),
            }
            for (operation, name), time in by_operation.most_common(dearest)
        ],
    }


def _short(source: str) -> str:
    """Returns the end of a path of scopes, the most informative part."""
    plumbing = ("while", "body", "closed_call", "checkpoint", "rematted_computation")
    return "/".join(part for part in source.split("/") if part not in plumbing)[-90:]
