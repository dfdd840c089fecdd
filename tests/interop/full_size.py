"""A random model of full published size through both conversions: time and peak memory. Run by hand, not by pytest.

    python tests/interop/full_size.py --size 3b --dir /tmp/full_size

Writes sharded bfloat16 safetensors in the published format, imports them, exports them again and compares every byte
of every tensor. Takes three times the model's disk room (3b: 30 GB, 8b: 60 GB); the folder is removed at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from fusion_jax.interop import table
from fusion_jax.interop.families import family_of
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.tensors import DTYPES, TensorFolder, TensorWriter
from fusion_jax.models.config import VARIANTS


def write_random(folder: Path, size: str) -> int:
    """FUSION at `size` with random bfloat16 weights; returns the number of parameters."""
    model = VARIANTS["fusion"][size]
    folder.mkdir(parents=True)
    template = {"3b": "phi3", "8b": "llama3"}[size]
    described = published_config(model, template, {}, "bfloat16")
    (folder / "config.json").write_text(json.dumps(described))
    rows = table.published_rows(model, parameter_shapes(model), family_of(described["model_type"]).fused)
    writer = TensorWriter(folder, {row.name: (row.shape, "bfloat16") for row in rows})
    noise = np.random.default_rng(0).standard_normal(2**24 + 1, np.float32).astype(DTYPES["bfloat16"])
    for i, row in enumerate(rows):
        flat = writer[row.name].reshape(-1)
        for start in range(0, flat.size, noise.size - 1):  # another shift for each tensor and block
            part = flat[start : start + noise.size - 1]
            part[...] = np.roll(noise, 7919 * i + start)[: part.size]
    return sum(int(np.prod(row.shape)) for row in rows)


def measured(*arguments) -> dict[str, float]:
    """Runs a conversion; seconds, and peaks of anonymous and of all resident memory in GiB."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fusion_jax.convert", *map(str, arguments)])
    peaks = {"RssAnon": 0, "VmHWM": 0}

    def watch():
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        sys.exit(code)
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_anonymous_gib": round(peaks["RssAnon"] / 2**20, 2),
        "peak_resident_gib": round(peaks["VmHWM"] / 2**20, 2),
    }


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold equal tensors, bit for bit, but for those that the export adds unused."""
    first, second = TensorFolder(a), TensorFolder(b)
    return all(np.array_equal(first.get(n).view(np.uint16), second.get(n).view(np.uint16)) for n in first.entries)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=("3b", "8b"), default="3b")
    parser.add_argument("--dir", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True)
    try:
        source, middle, back = (arguments.dir / name for name in ("published", "checkpoint", "back"))
        result = {"size": arguments.size, "parameters": write_random(source, arguments.size)}
        result["import"] = measured("import", "--from", source, "--out", middle)
        result["export"] = measured("export", "--checkpoint", middle, "--format", "published", "--out", back)
        result["equal"] = same(source, back)
        print(json.dumps(result))
    finally:
        shutil.rmtree(arguments.dir)


if __name__ == "__main__":
    main()
