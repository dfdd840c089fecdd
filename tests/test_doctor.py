"""The doctor: run for real, and where something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_run
from helpers.shapes_data import make_shapes

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.devices import device_check, machine_check, software_check
from fusion_jax.devices.device_check import Fact, Problem
from fusion_jax.training import config_check

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "helpers" / "tiny_run.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "4,4,4,2,2")


def run(*arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "XLA", "JAX"))}
    return subprocess.run(
        [sys.executable, "-m", "fusion_jax.doctor", *map(str, arguments)],
        **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300},
        env=clean | {"JAX_PLATFORMS": "cpu"} | variables,
    )


def problems(findings):
    return [finding for finding in findings if isinstance(finding, Problem)]


def test_a_good_place_is_ready_and_says_what_it_has(data, tmp_path):
    result = run("--config", f"{CONFIG}:{data}", "--workdir", tmp_path / "new" / "run", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["ready"] and not [problem for problem in report["problems"] if problem["stops"]]
    facts = {(fact["section"], fact["name"]): fact["value"] for fact in report["facts"]}
    assert "TFLOP/s" in facts["devices", "cpu 0"] and facts["versions", "jax"] != "missing"
    assert int(facts["config", "parameters"].split(",")[0]) > 0 and "GiB free" in facts["disk", "workdir"]
    assert not (tmp_path / "new").exists()  # it looks, it makes nothing


def test_every_fault_of_a_bad_place_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("--config", f"{CONFIG}:{tmp_path}/none", "--workdir", tmp_path / "file" / "run", JAX_PLATFORMS="tpu")
    assert result.returncode == 1 and not result.stderr
    assert "JAX_PLATFORMS=tpu asks for devices" in result.stdout
    assert f"workdir {tmp_path}/file/run cannot be written" in result.stdout
    assert "no tokenizer folder" in result.stdout and "stage1.yaml" in result.stdout
    assert result.stdout.count("\n    -> ") >= 4 and result.stdout.endswith("Training would not start here.\n")


def test_unknown_compiler_flags_and_arguments():
    result = run(XLA_FLAGS="--xla_no_such_flag=1")
    assert result.returncode == 1
    assert "XLA_FLAGS has a flag that this version does not know: --xla_no_such_flag=1" in result.stdout
    result = run("now")
    assert result.returncode == 2 and result.stderr.startswith("error: Unexpected argument 'now'")


def test_devices_that_hang_are_given_up():
    problem = device_check.ask_devices(patience=0.01)
    assert problem.stops and "did not answer within 0.01 s" in problem.what


@pytest.mark.parametrize(
    "stderr, platforms, expected",
    [
        ("=== trace\nERROR: Unknown command line flag 'xla_tpu_nope'", "", "LIBTPU_INIT_ARGS has a flag"),
        ("The TPU is already in use by process with pid 4", "", "in use by another process"),
        ("RuntimeError: RESOURCE_EXHAUSTED: Out of memory", "", "memory is taken"),
        ("AssertionError", "cuda", "JAX_PLATFORMS=cuda asks for devices"),
        ("Traceback\nRuntimeError: something new", "", "something new"),
        ("Traceback\nModuleNotFoundError: No module named 'jax'", "", "cannot be loaded"),
        ("", "", "without a word"),
    ],
)
def test_what_ended_the_devices_process_becomes_a_sentence(stderr, platforms, expected):
    problem = device_check.explain(stderr, platforms)
    assert problem.stops and expected in problem.what and problem.do


def device(**changes):
    return {"platform": "tpu", "kind": "TPU v5p", "memory": 95 << 30, "flops": 400e12, "right": True} | changes


def answer(**changes):
    return {"devices": [device(**changes)], "count": 128, "sum": True}


def test_devices_are_compared_with_their_datasheet():
    fact, count = device_check.check_devices(answer())
    assert fact.value == "TPU v5p: 95.0 GiB, 400.00 TFLOP/s, 87% of the datasheet's 459" and "128" in count.value
    [slow] = problems(device_check.check_devices(answer(flops=50e12)))
    assert not slow.stops and "only 11%" in slow.what
    [wrong] = problems(device_check.check_devices(answer(right=False)))
    assert wrong.stops and "wrongly" in wrong.what
    [apart] = problems(device_check.check_devices(answer() | {"sum": False}))
    assert apart.stops


def test_an_accelerator_that_is_not_used_is_noticed(monkeypatch):
    cpu = answer(platform="cpu", kind="cpu", memory=0)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    [problem] = problems(device_check.check_devices(cpu))
    assert "NVIDIA GPU, but JAX computes on the processor" in problem.what
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not problems(device_check.check_devices(cpu))


def usage(free):
    return lambda path: SimpleNamespace(total=100 << 30, free=free)


def test_room_for_checkpoints(monkeypatch, tmp_path):
    def found(free, state=0, kept=0):
        monkeypatch.setattr(machine_check.shutil, "disk_usage", usage(free))
        return problems(machine_check.check_folder("workdir", tmp_path, state, kept))

    assert not found(50 << 30, state=10 << 30, kept=3)
    [tight] = found(39 << 30, state=10 << 30, kept=3)
    assert not tight.stops and "4 checkpoints take 40.0 GiB" in tight.what
    [full] = found(9 << 30, state=10 << 30, kept=3)
    assert full.stops and "one checkpoint takes 10.0 GiB" in full.what
    [unknown] = found(1 << 20)
    assert unknown.stops


def test_a_full_disk_is_found_by_writing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
    except FileNotFoundError:
        pytest.skip("needs mount")
    try:
        (tmp_path / "all").write_bytes(b"x" * (64 << 10))
        [problem] = problems(machine_check.check_folder("workdir", tmp_path / "run"))
        assert problem.stops and "No space left" in problem.what
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_packages_missing_or_other_than_tested():
    findings = list(
        software_check.check_requirements(
            "jax>=0.1\nno-such-package==1.0  # why\nabsl-py==0.0.1\nx; python_version<'3'\n"
        )
    )
    assert [problem.stops for problem in findings] == [True, False]
    assert "no-such-package" in findings[0].what and "absl-py" not in findings[0].what
    assert "absl-py" in findings[1].what and "tested: 0.0.1" in findings[1].what


def test_a_containers_limits_count(monkeypatch):
    files = {"memory.max": str(1 << 30), "memory.current": str(3 << 28), "cpu.max": "50000 100000"}
    monkeypatch.setattr(machine_check, "_read", lambda path: files[Path(path).name])
    assert machine_check.memory() == (1 << 30, 1 << 28) and machine_check.cpus() == 0.5


def test_small_limits_are_named(monkeypatch):
    monkeypatch.setattr(machine_check.resource, "getrlimit", lambda which: (1024, 1 << 20))
    monkeypatch.setattr(machine_check, "memory", lambda: (8 << 30, 1 << 30))
    little, files = problems(machine_check.check_machine())
    assert "1.0 GiB of memory" in little.what and files.do == "ulimit -n 65536"


def test_clusters_are_seen(monkeypatch):
    for name in sum(machine_check.CLUSTERS.values(), ()):
        monkeypatch.delenv(name, raising=False)
    assert not problems(machine_check.check_cluster())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    [problem] = problems(machine_check.check_cluster())
    assert "16 tasks" in problem.what and "srun" in problem.do
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    assert not problems(machine_check.check_cluster())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert any("4 hosts" in fact.value for fact in machine_check.check_cluster() if isinstance(fact, Fact))


def test_buckets_are_no_workdirs_and_need_their_package_elsewhere(monkeypatch):
    monkeypatch.setattr(machine_check, "version", lambda package: None)
    [problem] = problems(machine_check.check_disk("gs://bucket/run"))
    assert problem.stops and "must be a folder" in problem.what and "Mount" in problem.do
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    [problem] = problems(machine_check.check_disk(None))
    assert not problem.stops and "gcsfs" in problem.what


def test_a_model_larger_than_all_devices(data, tmp_path):
    config = from_dict(RunConfig, tiny_run.get_config(str(data)).to_dict())
    small = answer(memory=1000) | {"count": 2}
    [problem] = problems(config_check.check_config(config, small, str(tmp_path)))
    assert problem.stops and "Weights and optimizer take" in problem.what
    assert not problems(config_check.check_config(config, answer() | {"count": 2}, str(tmp_path)))
