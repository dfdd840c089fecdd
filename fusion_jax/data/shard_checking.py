"""Compares shards with their manifest: sizes, hashes, counts and every record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_jax.data import shards
from fusion_jax.data.workers import progress_bar, run_in_processes


def check_shards(out: str | Path, workers: int = 1, progress: bool = True) -> list[str]:
    """Reads all shards again. Returns one sentence for each deviation from the manifest. UserError without one."""
    out = Path(out)
    manifest = shards.read_manifest(out)
    known = {shard[kind]["name"] for shard in manifest["shards"] for kind in ("shard", "text")}
    unknown = sorted(path.name for path in out.glob("*.array_record") if path.name not in known)
    problems = [f"{out / name} is not in the manifest" for name in unknown]
    with progress_bar(manifest["records"], 0, "checking", progress) as bar:
        for more in run_in_processes(check_shard, ((out, shard) for shard in manifest["shards"]), workers, bar.update):
            problems += more
    return sorted(problems)


def check_shard(task: tuple[Path, dict[str, Any]], advance: Callable[[int], None]) -> list[str]:
    """Lists what is wrong with one shard: sizes, hashes, counts and every record of both files."""
    out, shard = task
    problems = []
    for kind in ("shard", "text"):
        path, file = out / shard[kind]["name"], shard[kind]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != file["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {file['bytes']}")
        elif (sha256 := shards.hash_file(path)) != file["sha256"]:
            problems.append(f"{path} has the hash {sha256}, the manifest says {file['sha256']}")
    path = out / shard["shard"]["name"]
    if not all((out / shard[kind]["name"]).is_file() for kind in ("shard", "text")):
        return problems
    try:
        whole, text = (shards.open_reader(out / shard[kind]["name"]) for kind in ("shard", "text"))
        counts = whole.num_records(), text.num_records()
        if counts != (shard["records"],) * 2:
            problems.append(f"{path} and its texts hold {counts} records, the manifest says {shard['records']}")
        images = size = 0
        for i in range(min(counts)):
            header, files = shards.unpack(whole.read([i])[0])
            if shards.parse_header(text.read([i])[0]) != header:
                problems.append(f"{path}, record {i} differs from {shard['text']['name']}")
            images, size = images + len(files), size + sum(map(len, files))
            advance(1)
        if (images, size) != (shard["images"], shard["image_bytes"]):
            problems.append(f"{path} holds {images} images of {size} bytes, the manifest says otherwise")
    except (RuntimeError, ValueError, OSError, IndexError, KeyError) as e:
        problems.append(f"{path} cannot be read to its end: {e}")
    return problems
