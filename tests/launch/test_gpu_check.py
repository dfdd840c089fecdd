"""The check of a GPU machine: the form of its report, what a cut leaves, and that whatever fails is told."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_check import __main__ as check
from gpu_check import goldens, kernels, report
from gpu_check.parts import Context, Part

from fusion_jax.models import attention

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}


def command(out, *arguments):
    return ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--dry_run", "--out", str(out), *arguments]


def read(out):
    """The report as JSON, after a look at the form of both files."""
    values = json.loads((out / "report.json").read_text())
    text = (out / "report.md").read_text()
    assert text.startswith("# GPU check") and all(
        f"| {name} | {part['state']} |" in text for name, part in values["parts"].items()
    )
    return values


def test_device_alone(tmp_path):
    done = subprocess.run(command(tmp_path, "--parts", "device"), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "all parts passed" in done.stdout, done.stdout + done.stderr
    values = read(tmp_path)
    assert values["state"] == "done" and values["dry_run"] and list(values["parts"]) == ["device"]
    figures = values["parts"]["device"]["figures"]
    assert figures["card"] == "cpu" and figures["matrix_product_tflops_bf16"] > 0 and figures["copy_gb_per_second"] > 0
    assert sorted(os.listdir(tmp_path)) == ["device.log", "report.json", "report.md"]


def cut(out, part, number):
    """The check, cut while that part runs: exit code and report."""
    process = subprocess.Popen(command(out, "--parts", part), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "report.json").exists() or read(out)["parts"][part]["state"] != "running":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
    finally:
        process.send_signal(number)
    return process.wait(timeout=20), read(out)


def test_sigterm_ends_the_part_and_the_report_says_so(tmp_path):
    code, values = cut(tmp_path, "goldens", signal.SIGTERM)
    assert code == 1 and values["state"] == "cut by SIGTERM"
    assert values["parts"]["device"]["state"] == "passed" and values["parts"]["device"]["figures"]["card"] == "cpu"
    assert values["parts"]["goldens"]["state"] == "cut"
    assert values["parts"]["goldens"]["failures"][-1] == "cut by SIGTERM"


def test_sigkill_leaves_a_whole_report(tmp_path):
    _, values = cut(tmp_path, "device", signal.SIGKILL)
    assert values["state"] == values["parts"]["device"]["state"] == "running"


def run(tmp_path, *groups, seconds=60.0):
    """Parts that are any Python programs, run as the check's are."""
    groups = [
        [
            Part(name, name.upper(), lambda _, code=code: ["timeit", "-n1", "-r1", code], limit, "x.log")
            for name, code, limit in group
        ]
        for group in groups
    ]
    written = report.Report(tmp_path, {part.name: part.title for group in groups for part in group}, 1, True)
    check.run(groups, written, tmp_path, True, time.monotonic() + seconds)
    written.end("done")
    return read(tmp_path)["parts"], written.passed


def test_each_end_of_a_part_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PATIENCE", 1)
    said = 'print(\'{"figure": 1, "failures": []}\')'
    parts, passed = run(
        tmp_path,
        [("good", said, 30)],
        [
            ("raises", f"{said}; raise ValueError('no such kernel')", 30),
            ("judged", 'print(\'{"failures": ["too slow"]}\')', 30),
        ],
        [("hangs", f"{said}; import time; time.sleep(100)", 3), ("silent", "pass", 30)],
    )
    assert not passed
    states = {name: (part["state"], part["failures"]) for name, part in parts.items()}
    assert states["good"] == ("passed", [])
    assert states["raises"] == ("failed", ["exit code 1: ValueError: no such kernel"])
    assert states["judged"] == ("failed", ["too slow"])
    assert states["hangs"] == ("cut", ["over its 3 s"])
    assert states["silent"] == ("failed", ["printed nothing"])
    assert parts["raises"]["figures"] == parts["hangs"]["figures"] == {"figure": 1}
    assert "no such kernel" in (tmp_path / "x.log").read_text()


def test_part_without_time_is_not_run(tmp_path):
    parts, passed = run(tmp_path, [("late", "pass", 30)], seconds=5)
    assert parts["late"]["state"] == "not run" and parts["late"]["failures"] == ["no time left"] and not passed


def test_report_holds_what_json_and_markdown_cannot(tmp_path):
    written = report.Report(tmp_path, {"a": "A"}, 1, False)
    written.set(
        "a", state="failed", failures=["x | y\nz"], figures={"rate": math.nan, "rows": [{"n": 1, "t": math.inf}]}
    )
    assert read(tmp_path)["parts"]["a"]["figures"] == {"rate": "nan", "rows": [{"n": 1, "t": "inf"}]}
    text = (tmp_path / "report.md").read_text()
    assert "| a | failed | 0 | x / y z |" in text and "| n | t |" in text


def test_missing_packages_are_named():
    wanted = {"json": "json", "no_such_module": "package", "no_such.module": "other[extra]"}
    assert check.missing(wanted) == ["package", "other[extra]"]
    assert check.missing(check.NEEDED) == check.missing(check.TRAINING) == []


def test_wrong_arguments():
    done = subprocess.run(command("x", "--parts", "kernel"), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 2 and "'kernel' is unknown; allowed: device, kernels" in done.stderr
    done = subprocess.run(command("x", "--minutes", "nine"), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 2 and "--minutes must be a number" in done.stderr


def kernel_check(monkeypatch, capsys, kernel):
    """What the kernels' part says of one small case with this kernel."""
    case = kernels.Case(8, 8, 2, 2, 8, 1, "packed", "packed", True)
    monkeypatch.setattr(kernels, "CASES", {"small": case})
    monkeypatch.setattr(kernels, "arguments", lambda: Context(False))
    monkeypatch.setattr(attention, "choose", lambda *_: kernel)
    kernels.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_kernels_are_judged(monkeypatch, capsys):
    def with_nan(*arguments):
        return attention.reference_attention(*arguments) * math.nan

    def unmasked(q, k, v, ours, theirs, causal, window):
        return attention.reference_attention(q, k, v)

    def broken(*_):
        raise NotImplementedError("no kernel for this head size")

    good = kernel_check(monkeypatch, capsys, attention.reference_attention)
    assert good["failures"] == [] and good["cases"][0]["passed"] and 0 < good["cases"][0]["out"] < 1e-2
    for kernel, why in ((with_nan, "error nan"), (unmasked, "error 1."), (broken, "no kernel for this head size")):
        said = kernel_check(monkeypatch, capsys, kernel)
        assert len(said["failures"]) == 1 and why in said["failures"][0], said["failures"]


def test_goldens_are_judged():
    good = {"states": 1e-5, "logits": 1e-5, "losses": 1e-6, "worst_gradient": 1e-5, "logits_relative": 0.01}
    narrow = good | {"dtype": "bfloat16", "states": 0.1}
    good["dtype"] = "float32"
    assert goldens.judge(good, "x") == goldens.judge(narrow, "x") == []
    for name in ("states", "logits", "losses", "worst_gradient"):
        for bad in (0.5, math.nan):
            assert name in goldens.judge(good | {name: bad}, "x")[0]
    assert goldens.judge(narrow | {"logits_relative": math.nan}, "x")
