"""Checks the machine for the doctor: memory, processors, limits, disks and variables set by clusters."""

import os
import resource
import shutil
import tempfile
from pathlib import Path

from fusion_jax.devices.device_check import GIB, Fact, Findings, Problem
from fusion_jax.devices.software_check import version

CLUSTERS = {
    "SLURM": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"),
    "TPU pod": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "MEGASCALE_NUM_SLICES"),
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
    "JAX": ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"),
}


def memory() -> tuple[int, int]:
    """Returns the bytes of memory that this process may use, within a container's limit, and how many are free."""
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
    """Returns the number of processors that this process may use, within a container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(usable, int(quota[0]) / int(quota[1]))
    return usable


def check_machine() -> Findings:
    """Checks processors, free memory and the limit of open files."""
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
    """Returns the path itself if it exists, else the nearest folder above it that does."""
    while not path.exists():
        path = path.parent
    return path


def check_folder(name: str, folder: Path, state: int = 0, kept: int = 0) -> Findings:
    """Checks that a folder can be written and has room for checkpoints.

    Args:
      name: what the report calls the folder. state: bytes of a checkpoint, 0 where unknown. kept: how many are kept.
    """
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
    # A new checkpoint is written before the oldest is removed.
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
    """Checks the folders of checkpoints and compiled programs, and shared memory.

    Args:
      state: bytes of a checkpoint, 0 where unknown. kept: how many are kept.
    """
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


def check_cluster() -> Findings:
    """Lists the variables by which clusters describe themselves, and checks that SLURM started this as a task."""
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
