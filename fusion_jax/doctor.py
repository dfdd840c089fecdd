"""What is here, and what would not work: `python -m fusion_jax.doctor [--workdir DIR] [--config FILE] [--json]`.

Lists devices, versions, memory, disk, limits and the variables of clusters, multiplies matrices on every device, and
ends with what would stop or slow down training, each in plain words with what to do. Exit code 1 if training would not
start.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from absl import flags
from packaging.requirements import Requirement

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.devices.device_check import GIB, ROOT, Fact, Findings, Problem, ask_devices, check_devices
from fusion_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
# What each package that is not required gives.
EXTRAS = {
    "torch": "pickled weights, exported models",
    "transformers": "exported models",
    "gcsfs": "data in gs:// buckets",
    "s3fs": "data in s3:// buckets",
    "wandb": "Weights & Biases",
    "xprof": "profiles in the browser",
    "tensorboard": "curves in the browser",
}
CLUSTERS = {
    "SLURM": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"),
    "TPU pod": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "MEGASCALE_NUM_SLICES"),
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
    "JAX": ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"),
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- Software.


def check_versions() -> Findings:
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
    """`text`: of requirements.txt, which pins what was tested."""
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
    names = (os.environ.get("CC", "").split() or [""])[0], "cc", "gcc", "clang"
    found = next((shutil.which(name) for name in names if name and shutil.which(name)), None)
    yield Fact("versions", "C compiler", found or "none")
    if not found:
        yield Problem(
            False,
            "There is no C compiler, so images are resized by Pillow alone, which is slower.",
            "Install gcc or clang, or set CC.",
        )


# ---- Machine.


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use and that are free; a container's limit counts."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current")
        total = min(total, int(limit))
        free = min(free, total - int(used or 0))
    return total, max(free, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def cpus() -> float:
    """Processors that this process may use; a container's quota counts."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(usable, int(quota[0]) / int(quota[1]))
    return usable


def check_machine() -> Findings:
    total, free = memory()
    yield Fact("machine", "processors", f"{cpus():g}")
    yield Fact("machine", "memory", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB of it free")
    if free < 2 * GIB:
        yield Problem(
            False, f"Only {free / GIB:.1f} GiB of memory are free.", "End other programs, or use more memory."
        )
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Fact("machine", "open files", f"{files} (at most {hard})")
    if files < 4096:
        yield Problem(
            False,
            f"This shell lets a process open {files} files; many shards or workers need more.",
            f"ulimit -n {min(hard, 65536)}" if hard >= 4096 else "Ask for a higher limit (nofile).",
        )


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def check_folder(name: str, folder: Path, state: int = 0, kept: int = 0) -> Findings:
    """Can `folder` be written, and does it have room for checkpoints of that size (0: unknown)?"""
    there = nearest(folder.absolute())
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        yield Fact("disk", name, f"{folder}: cannot be written")
        yield Problem(True, f"{name} {folder} cannot be written ({reason}).", f"Free room, or choose another {name}.")
        return
    usage = shutil.disk_usage(there)
    yield Fact("disk", name, f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free")
    # A new checkpoint is written before the oldest goes.
    wanted = (kept + 1) * state
    if usage.free < max(state, 2**28):
        need = f"one checkpoint takes {state / GIB:.1f} GiB" if state else "no checkpoint fits"
        yield Problem(
            True,
            f"The disk of {name} {folder} has {usage.free / GIB:.2f} GiB free; {need}.",
            f"Free room, or choose another {name}.",
        )
    elif usage.free < max(wanted, 5 * GIB):
        need = f"{kept + 1} checkpoints take {wanted / GIB:.1f} GiB" if state else "checkpoints may not fit"
        yield Problem(
            False,
            f"The disk of {name} {folder} has {usage.free / GIB:.1f} GiB free; {need}.",
            "Free room, or keep fewer checkpoints (config.keep_checkpoints).",
        )


def check_disk(workdir: str | None, state: int = 0, kept: int = 0) -> Findings:
    """`state`: bytes of a checkpoint, 0 where unknown; `kept`: how many stay."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    for name, folder in (("workdir", workdir), ("compilation cache", cache)):
        if folder and "://" in folder:
            yield Fact("disk", name, f"{folder}: a bucket, not tried here")
            package = {"gs": "gcsfs", "s3": "s3fs"}.get(folder.split("://")[0])
            if name == "workdir":
                yield Problem(True, f"--workdir={folder} must be a folder.", "Mount the bucket and give the folder.")
            elif package and not version(package):
                yield Problem(False, f"{name} {folder} needs {package}.", f"pip install {package}")
        elif folder:
            yield from check_folder(name, Path(folder), *((state, kept) if name == "workdir" else ()))
    if not cache:
        yield Fact("disk", "compilation cache", f"{Path(workdir) / 'compiled' if workdir else 'WORKDIR/compiled'}")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        yield Fact("disk", "/dev/shm", f"{free / GIB:.2f} GiB free")
        if free < 2**28:
            yield Problem(
                False,
                f"/dev/shm has only {free / 2**20:.0f} MiB free; loader processes and NCCL use it.",
                "Start the container with --shm-size 8g (docker) or a memory volume on /dev/shm (Kubernetes).",
            )


# ---- Clusters.


def check_cluster() -> Findings:
    for cluster, names in CLUSTERS.items():
        for name in names:
            if name in os.environ:
                yield Fact("variables", name, os.environ[name])
        if cluster not in ("JAX", "Kubernetes") and not any(name in os.environ for name in names):
            yield Fact("variables", cluster, "not set")
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in os.environ and tasks != "1" and "SLURM_STEP_NODELIST" not in os.environ:
        yield Problem(
            False,
            f"This is a SLURM job of {tasks} tasks, but not one of its tasks: training would be a single process here.",
            "Start it with srun, or by launch/slurm.sh.",
        )
    hosts = [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        yield Fact("variables", "pod", f"{len(hosts)} hosts; all of them must run the same command at once")


# ---- Configuration.


def count_parameters(config) -> tuple[int, int]:
    """Parameters in all, and of the stage that trains most; nothing is computed."""
    with loading():
        import jax

        from fusion_jax.models import fusion
        from fusion_jax.training import optim

    jax.config.update("jax_platforms", "cpu")  # of this process, which must not take the accelerator for this
    params = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    sizes = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.size, params))
    trained = [
        sum(
            n
            for n, label in zip(sizes, jax.tree.leaves(optim.labels(stage, params)))
            if label not in (optim.FROZEN, optim.ROWS)
        )
        for stage in config.stages
    ]
    return sum(sizes), max(trained)


def state_bytes(total: int, trained: int) -> int:
    """Of float32 weights and both moments of AdamW, in memory and in a checkpoint."""
    return 4 * total + 8 * trained


def check_inputs(look, config, workdir: str | None, accepted, devices: int) -> Findings:
    """What training itself would say before it begins (`checks.open_inputs`), all of it."""
    problems, warnings = [], []
    log, handler = logging.getLogger("fusion_jax"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    printed, log.handlers = log.handlers, [handler]
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            look(config, Path(workdir or nowhere), accepted, problems, devices)
    except OSError as error:
        problems.append(UserError(f"{error.filename or workdir} cannot be used ({error.strerror or error})."))
    finally:
        log.handlers = printed
    for problem in dict.fromkeys(map(str, problems)):
        yield Problem(True, problem, "Training would end with this sentence.")
    for warning in dict.fromkeys(warnings):
        yield Problem(False, warning, "Training would say so and go on.")


def check_config(config, answer: dict | Problem, workdir: str | None, accepted=()) -> Findings:
    """The config against this machine. `config` is a RunConfig, `answer` of `ask_devices`."""
    known = isinstance(answer, dict)
    if not known:  # what broke the devices' process must not break this one
        os.environ.pop("XLA_FLAGS", None)
    with loading():
        import jax

        jax.config.update("jax_platforms", "cpu")  # of this process, which must not take the accelerator for this
        from fusion_jax.training import checks
    yield from check_inputs(checks.open_inputs, config, workdir, accepted, answer["count"] if known else 0)
    if not known:
        yield from check_disk(workdir)
        return
    total, trained = count_parameters(config)
    yield Fact("config", "parameters", f"{total:,}, {trained:,} of them trained")
    state = state_bytes(total, trained)
    yield Fact("config", "state", f"{state / GIB:.1f} GiB over all devices; gradients and activations come on top")
    hbm = answer["devices"][0]["memory"] * answer["count"] or memory()[0]
    if state > hbm:
        yield Problem(
            True,
            f"Weights and optimizer take {state / GIB:.1f} GiB; all devices have {hbm / GIB:.1f} GiB.",
            "Use more devices, or freeze parts (config.stages[i].freeze).",
        )
    yield from check_disk(workdir, state, config.keep_checkpoints)


# ---- The report.


def examine() -> tuple[list[Fact], list[Problem]]:
    """All checks, in the order of the report."""
    findings: list[Fact | Problem] = []
    answer = ask_devices(flags.FLAGS.patience)
    findings += check_devices(answer)
    findings += check_versions()
    findings += check_compiler()
    findings += check_machine()
    if flags.FLAGS.config is None:
        findings += check_disk(flags.FLAGS.workdir)
    else:
        with loading():
            from fusion_jax.config import RunConfig, from_dict

        try:
            config = from_dict(RunConfig, flags.FLAGS.config.to_dict())
            findings.extend(check_config(config, answer, flags.FLAGS.workdir, flags.FLAGS.accept_changed))
        except UserError as error:
            findings.append(Problem(True, str(error), "See the config."))
    findings += check_cluster()
    facts = [finding for finding in findings if isinstance(finding, Fact)]
    return facts, sorted((f for f in findings if isinstance(f, Problem)), key=lambda problem: not problem.stops)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(
            f"Unexpected argument {argv[1]!r}; doctor takes --workdir, --config, --accept_changed, --patience, --json."
        )
    facts, problems = examine()
    stops = any(problem.stops for problem in problems)
    if flags.FLAGS.json:
        report = {"facts": facts, "problems": problems}
        report = {name: [dataclasses.asdict(item) for item in items] for name, items in report.items()}
        print(json.dumps({"ready": not stops, **report}, indent=1))
    else:
        for section in dict.fromkeys(fact.section for fact in facts):
            print(f"\n{section}")
            for fact in facts:
                if fact.section == section:
                    print(f"  {fact.name:<18} {fact.value}")
        print()
        for problem in problems:
            print(f"{'WOULD NOT START' if problem.stops else 'would hurt'}: {problem.what}\n    -> {problem.do}")
        print("Training would not start here." if stops else "Training would start here.")
    if stops:
        sys.exit(1)


if __name__ == "__main__":
    define_config("run configuration to look at as well")
    flags.DEFINE_string("workdir", None, "folder that training would write to")
    flags.DEFINE_bool("json", False, "print one JSON object instead, for a bug report")
    flags.DEFINE_list("accept_changed", [], "as for training")
    flags.DEFINE_integer("patience", 180, "seconds that the devices may take to answer", lower_bound=1)
    run_main(main)
