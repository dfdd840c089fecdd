"""Are the files of a checkpoint what was written? Their sizes and checksums lie beside them.

    <step>/files.<process>.json     {"params/manifest.ocdbt": [116, 2774283010], ...}

Every process lists the files that it wrote itself, after the checkpoint is complete. A checkpoint whose writer died
before the list was there is not suspect: only nothing is known, and reading it decides.
"""

import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_OWNER = re.compile(r"ocdbt\.process_(\d+)")  # Orbax's folder of what one process wrote
_BLOCK = 1 << 22


def write(folder: Path, process: int) -> None:
    """Lists the files of a complete step folder that belong to `process`; those of nobody belong to process 0."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        owner = _OWNER.search(name)
        if path.is_file() and int(owner.group(1) if owner else 0) == process and not _is_list(name):
            entries[name] = [path.stat().st_size, checksum(path)]
    target = folder / f"files.{process}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(entries))
    temporary.replace(target)


def problem(folder: Path, process: int = 0, processes: int = 1, thorough: bool = True) -> str | None:
    """What is wrong with a step folder's files, in words; None where all are whole or nothing is known.

    Each of `processes` looks at its share of the lists. Without `thorough` only sizes are compared.
    """
    lists = sorted(path for path in folder.glob("files.*.json") if _is_list(path.name))
    jobs = []
    for path in lists[process::processes]:
        try:
            jobs += [(folder / name, *expected) for name, expected in json.loads(path.read_text()).items()]
        except (ValueError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    for path, size, _ in jobs:
        name = path.relative_to(folder)
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    if thorough:
        with ThreadPoolExecutor(4) as pool:
            for (path, _, expected), found in zip(jobs, pool.map(lambda job: checksum(job[0]), jobs)):
                if found != expected:
                    return f"the content of {path.relative_to(folder)} has changed"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _is_list(name: str) -> bool:
    return re.fullmatch(r"files\.\d+\.(json|tmp)", name) is not None
