"""Reads what a program for an accelerator consists of, from its lowered and its compiled form."""

import re
from collections import Counter
from dataclasses import dataclass

# Attention kernels by their names in compiled programs. Forward kernels that a backward pass runs again count twice.
_KERNELS = {
    "flash forward": r"custom-call\(.*\"tpu_custom_call\".*segment_flash_tpu_forward",
    "flash backward": r"custom-call\(.*\"tpu_custom_call\".*segment_flash_tpu_backward",
    "cuDNN forward": r"custom_call_target=\"__cudnn\$fmha[A-Za-z]*(?<!Backward)\"",
    "cuDNN backward": r"custom_call_target=\"__cudnn\$fmha[A-Za-z]*Backward\"",
    "Triton forward": r"custom-call\(.*\"__gpu\$xla\.gpu\.triton\".*segment_flash_forward",
    "Triton backward": r"custom-call\(.*\"__gpu\$xla\.gpu\.triton\".*segment_flash_(?:keys|queries)",
}
# What makes a device wait for its host: a queue between them, a call of Python, arrays in the host's memory.
_HOST = (
    r" (outfeed|infeed)\(",
    r" (send|recv)\(.*is_host_transfer=true",
    r"custom_call_target=\"([^\"]*(?:[Cc]allback|[Hh]ost)[^\"]*)\"",
    r"\{[\d,]*:[^}]*(S\(5\))[^}]*\}",
)


@dataclass(frozen=True)
class Facts:
    """kernels: attention kernels and how often each stands in the program. float32: places in the source of matrix
    products of float32 numbers. host: whatever makes the device wait for the host."""

    kernels: dict[str, int]
    float32: list[str]
    host: list[str]


def read(lowered, compiled) -> Facts:
    """Facts of a program, a `jax.stages.Lowered` and what it was compiled to."""
    text = compiled.as_text()
    return Facts(kernels(text), float32_products(lowered.compiler_ir("stablehlo")), host(text))


def kernels(text: str) -> dict[str, int]:
    matches = {name: len(re.findall(pattern, text)) for name, pattern in _KERNELS.items()}
    return {name: count for name, count in matches.items() if count}


def written(text: str, dtypes: tuple[str, ...], shapes: set[tuple[int, int]]) -> list[str]:
    """Instructions that write a matrix of one of these dtypes and shapes, in either order, to the device's memory.

    What only exists within a fusion is not written.
    """
    fused, inside, lines = set(re.findall(r"calls=%?([\w.-]+)", text)), "", []
    matrices = {(*ones, *shape) for shape in shapes for ones in ((), (1,))}
    matrices |= {(*shape[:-2], *shape[:-3:-1]) for shape in matrices}
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = start[1]
        result = re.search(r" = (\w+)\[([\d,]+)\]\S* (?!parameter|get-tuple-element|bitcast)[\w-]+\(", line)
        if not result or inside in fused or result[1] not in dtypes:
            continue
        if tuple(map(int, result[2].split(","))) in matrices:
            lines.append(line.strip()[:200])
    return lines


def host(text: str) -> list[str]:
    matches = Counter(match[1] for pattern in _HOST for match in re.finditer(pattern, text))
    return sorted(matches)


def float32_products(module) -> list[str]:
    """Source names of products whose operands are float32, from StableHLO: there every product is still one
    operation, of the dtypes that our code gave it."""
    matches = []

    def look(operation) -> None:
        if operation.name in ("stablehlo.dot_general", "stablehlo.convolution") and any(
            "f32" in str(operand.type.element_type) for operand in operation.operands
        ):
            matches.append(_source(str(operation.location)))
        for region in operation.regions:
            for block in region:
                for inside in block:
                    look(inside.operation)

    look(module.operation)
    return sorted(set(matches))


def _source(location: str) -> str:
    names = re.findall(r'"([^"]*(?:dot_general|conv_general_dilated))"', location)
    return names[0] if names else location[:200]
