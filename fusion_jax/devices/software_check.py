"""Checks the installed software for the doctor: versions, requirements, optional packages, C compiler."""

import importlib.metadata
import os
import platform
import shutil
import sys

from packaging.requirements import Requirement

from fusion_jax.devices.device_check import ROOT, Fact, Findings, Problem

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
# Optional packages, and what each is for.
EXTRAS = {
    "torch": "pickled weights, exported models",
    "transformers": "exported models",
    "gcsfs": "data in gs:// buckets",
    "s3fs": "data in s3:// buckets",
    "wandb": "Weights & Biases",
    "xprof": "profiles in the browser",
    "tensorboard": "curves in the browser",
}


def version(package: str) -> str | None:
    """Returns the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> Findings:
    """Checks Python, the required packages and JAX's plug-ins, and lists the optional packages."""
    yield Fact("versions", "python", f"{platform.python_version()}, {platform.platform()}")
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        yield Problem(False, f"Python {platform.python_version()} is not tested.", "Use Python 3.11 or 3.12.")
    for package in PACKAGES:
        yield Fact("versions", package, version(package) or "missing")
    for plugin in PLUGINS:
        if version(plugin):
            yield Fact("versions", plugin, version(plugin))
    requirements = ROOT / "requirements.txt"
    if requirements.exists():
        yield from check_requirements(requirements.read_text())
    cuda = [plugin for plugin in PLUGINS if "cuda" in plugin and version(plugin)]
    for plugin in cuda:
        if version(plugin) != version("jaxlib"):
            yield Problem(
                True,
                f"{plugin} {version(plugin)} does not belong to jaxlib {version('jaxlib')}.",
                "Install both together: pip install -e '.[gpu]'.",
            )
    for package, purpose in EXTRAS.items():
        yield Fact("extras", package, version(package) or f"not installed (only for {purpose})")


def check_requirements(text: str) -> Findings:
    """Compares what is installed with the text of requirements.txt, which pins what was tested."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    required = [Requirement(line) for line in lines if line]
    required = [r for r in required if r.marker is None or r.marker.evaluate()]
    missing = [r.name for r in required if version(r.name) is None]
    if missing:
        yield Problem(True, f"Not installed: {', '.join(missing)}.", "pip install -r requirements.txt")
    other = [
        f"{r.name} {version(r.name)} (tested: {str(r.specifier).removeprefix('==')})"
        for r in required
        if version(r.name) and not r.specifier.contains(version(r.name), prereleases=True)
    ]
    if other:
        yield Problem(False, f"Other versions than tested: {', '.join(other)}.", "pip install -r requirements.txt")


def check_compiler() -> Findings:
    """Looks for the C compiler that builds `data/resample.c` (resizing) and the kernels in `models/`."""
    names = (os.environ.get("CC", "").split() or [""])[0], "cc", "gcc", "clang"
    compiler = next((shutil.which(name) for name in names if name and shutil.which(name)), None)
    yield Fact("versions", "C compiler", compiler or "none")
    if not compiler:
        yield Problem(
            False,
            "There is no C compiler, so images are resized by Pillow, and attention on CPU computed by XLA, which is "
            "slower.",
            "Install gcc or clang, or set CC.",
        )
