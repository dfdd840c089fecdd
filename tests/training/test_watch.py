"""The lock on a workdir, the watchdog, spikes, the metrics file on a full disk, parsing of traced steps."""

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.training import lock, metrics, watch
from fusion_jax.training.jsonl import read_rows, truncate_rows
from fusion_jax.training.memory import explain_memory_errors, memory_in_use
from fusion_jax.training.plots import plot_losses
from fusion_jax.training.profiling import Profile, parse_steps
from fusion_jax.training.saving import Every
from fusion_jax.training.writer import Writer, import_wandb


def test_workdir_of_a_live_run_is_refused_and_of_a_dead_one_taken_over(tmp_path):
    """Another process holds it, then dies without a word."""
    script = (
        "import sys, time, pathlib\nfrom fusion_jax.training import lock\n"
        "with lock.hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"is in use by a live run .process {process.pid} on {socket.gethostname()}"),
            lock.hold(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    with lock.hold(tmp_path):  # one that ended in order
        pass


ODD = {
    "garbage": b"\xff\xfe{",
    "zeros": b"\0" * 100,
    "a list": b"[1]",
    "a number": b"5",
    "no keys": b"{}",
    "a host that is a list": json.dumps({"pid": 1, "host": ["x"], "since": "then"}).encode(),
    "no host": b'{"pid": 1, "since": "then"}',
    "deeply nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", ODD)
def test_lock_file_of_another_form_is_written_anew(tmp_path, content):
    (tmp_path / lock.FILE).write_bytes(ODD[content])
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / lock.FILE).read_bytes() == b""


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link", "a loop", "no place"])
def test_lock_file_that_is_no_file_is_said(tmp_path, kind):
    path, other = tmp_path / lock.FILE, tmp_path / "other"
    other.write_text("mine")
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "no place":
        tmp_path = other
    else:
        path.symlink_to(path if kind == "a loop" else other)
    with pytest.raises(UserError, match=rf"The lock file {tmp_path / lock.FILE} cannot be opened"), lock.hold(tmp_path):
        pass
    assert other.read_text() == "mine"


def test_a_run_that_stops_on_request_leaves_no_signature(tmp_path, caplog):
    """In the middle of anything: it ends at once, because there is nothing to save. A killed one leaves its own."""
    script = (
        "import sys, time, pathlib\nfrom fusion_jax.training import lock, stopping\n"
        "with stopping.Stop(), lock.hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        process.send_signal(number)
        assert process.wait(20) == code
        caplog.clear()
        with caplog.at_level("INFO", "fusion_jax"), lock.hold(tmp_path):
            assert ("ended without a word" in caplog.text) == (number == signal.SIGKILL)


@pytest.mark.parametrize("alive", [True, False])
def test_lock_of_another_host_is_judged_by_its_signs_of_life(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "STALE", 0.4)
    path = tmp_path / lock.FILE
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}))
    if alive:
        threading.Timer(0.1, os.utime, (path, (1, 1))).start()
        with pytest.raises(UserError, match="process 1 on elsewhere, since then"), lock.hold(tmp_path):
            pass
    else:
        with lock.hold(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_run_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW", 0.02)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.FILE, (1, 1))
        deadline = time.time() + 10
        while (tmp_path / lock.FILE).stat().st_mtime == 1:
            assert time.time() < deadline
            time.sleep(0.01)


def test_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.hold(tmp_path):
        assert "has no locks" in caplog.text


def test_watchdog_shows_every_threads_stack_once_per_period(caplog):
    def the_thread_that_hangs():
        released.wait()

    released = threading.Event()
    thread = threading.Thread(target=the_thread_that_hangs)
    thread.start()
    try:
        with watch.Watch(0.3 / 60) as phase:
            for _ in range(8):  # busy, but never silent for long
                with phase("computing"):
                    time.sleep(0.06)
            assert not caplog.records
            with phase("waiting for input") as seconds:
                time.sleep(0.55)
        assert 0.5 < seconds() < 5
    finally:
        released.set()
        thread.join()
    assert len(caplog.records) == 1
    assert "(waiting for input)" in caplog.text and "the_thread_that_hangs" in caplog.text
    assert "test_watchdog_shows" in caplog.text, "the main thread too"


def test_spikes_stand_out_from_noise_and_trend():
    rng = np.random.default_rng(0)

    def step(total, grad_norm, update_norm=1.0):
        return {"total": total, "grad_norm": grad_norm, "update_norm": update_norm}

    steps = [step(5 * 0.99**i + 0.1 * rng.normal(), 1 + 0.3 * rng.random()) for i in range(300)]
    spikes = metrics.Spikes()
    assert spikes.find(1, steps) == []
    sentences = spikes.find(301, [step(3.0, 1.1), step(0.3, 40.0), step(np.nan, 1.0, np.nan), step(0.3, 1.1, np.inf)])
    assert [text.split(" is ")[0] for text in sentences] == [
        "step 301: total 3",
        "step 302: grad_norm 40",
        "step 303: total",
        "step 304: update_norm",
    ]
    assert "though loss and gradient are finite" in sentences[-1]
    # A few spikes do not make the next one normal.
    assert len(spikes.find(305, [step(3.0, 1.0)] * 5)) == 5


def test_full_disk_costs_no_metrics_line_and_no_run(tmp_path, caplog):
    writer = Writer(tmp_path, 0)
    writer.scalars(1, {"ce": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 3, hard))
    try:
        for step in range(2, 40):  # more than TensorBoard's queue holds
            writer.scalars(step, {"ce": float(step), "total": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.scalars(40, {"ce": 40.0})
    writer.close()
    assert "training goes on" in caplog.text
    assert [row["ce"] for row in read_rows(writer.path)] == [float(step) for step in range(1, 41)]


DAMAGED = {
    "torn at the end": b'{"step": 2, "ce"',
    "torn in the middle": b'{"step": 2, "c\n{"step": 3, "ce": 1.0}\n',
    "no UTF-8": b'{"step": 2, "ce": \xff\xfe}\n',
    "zeros": b"\0" * 5000,
    "a number": b"5\n",
    "a list": b"[]\n",
    "a text": b'"x"\n',
    "no step": b'{"ce": 1.0}\n',
    "a step that is no number": b'{"step": "2"}\n',
    "a step that is NaN": b'{"step": NaN}\n',
    "a step with a fraction": b'{"step": 2.5}\n',
    "a step below 0": b'{"step": -2}\n',
    "a huge step": b'{"step": 1' + b"0" * 5000 + b"}\n",
    "deeply nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_records.jsonl"])
def test_damaged_lines_are_cut_off_with_a_warning(tmp_path, caplog, name, damage):
    good = b'{"step": 1, "ce": 1.0}\n'
    path = tmp_path / name
    path.write_bytes(good + DAMAGED[damage])
    writer = Writer(tmp_path, 2)
    truncate_rows(path, 2)
    writer.scalars(3, {"ce": 0.5})
    writer.close()
    assert path.read_bytes().startswith(good)
    assert [row["step"] for row in read_rows(path)] == ([1, 3] if name == "metrics.jsonl" else [1])
    assert caplog.text.count(f"{path}: 1 damaged line(s) cut off (2)") == 1
    plot_losses({"stage": path}, tmp_path / "losses.png")


def test_plot_leaves_out_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = ['"x"', "[1]", "null", "true", "1" + "0" * 400, "1e999", "NaN", "0.5"]
    path.write_text("".join(f'{{"step": {step}, "ce": {value}}}\n' for step, value in enumerate(values)))
    plot_losses({"stage": path}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_records.jsonl"])
def test_log_that_is_no_file_is_said(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} must be a file"):
        truncate_rows(tmp_path / name, 0)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} must be a file"):
        truncate_rows(tmp_path / name, 0)


WANDB = """
class Run:
    def log(self, values, step):
        raise ConnectionError("the network is down")

    def finish(self):
        raise ConnectionError("the network is down")


def init(project, **_):
    if project == "refused":
        raise RuntimeError("no API key\\nsecond line")
    return Run()
"""


def test_failing_wandb_costs_its_rows_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        UserError, match=r"Weights & Biases could not be started .*\(no API key\); .*WANDB_MODE=offline"
    ):
        Writer(tmp_path / "refused", 0, "refused")
    writer = Writer(tmp_path / "stage", 0, "project")
    for step in (1, 2, 3):
        writer.scalars(step, {"ce": 1.0})
        writer.publish()
    writer.close()
    monkeypatch.delitem(sys.modules, "wandb")
    assert [row["step"] for row in read_rows(writer.path)] == [1, 2, 3]
    assert caplog.text.count("Weights & Biases gets nothing: ConnectionError: the network is down") == 1


def test_restarted_writer_knows_what_was_written(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.scalars(4, {"ce": 1.0})
    writer.scalars(4, {"validation/ce": 1.0})
    writer.scalars(5, {"ce": 1.0})
    writer.close()
    again = Writer(tmp_path, 4)
    assert again.has(4, "validation/ce") and not again.has(5, "ce")
    again.close()


def test_missing_wandb_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.wandb_project needs Weights & Biases .*pip install wandb"):
        import_wandb()


def test_steps_to_trace():
    assert parse_steps("") is None and parse_steps("3:5") == (3, 5)
    for wrong in ("3", "5:3", "0:2", "a:b", "3:"):
        with pytest.raises(UserError, match="must be FIRST:LAST"):
            parse_steps(wrong)


def test_trace_covers_its_steps(tmp_path):
    tracer = Profile((2, 3), tmp_path)
    for step in range(1, 6):
        tracer.before(step)
        tracer.after(step, jnp.zeros(()) + step)
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
    tracer.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_trace_that_cannot_be_taken_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    jax.profiler.start_trace(str(tmp_path / "other"))  # one at a time
    try:
        tracer = Profile((1, 2), tmp_path / "file")
        for step in (1, 2, 3):
            tracer.before(step)
            tracer.after(step, jnp.zeros(()))
        tracer.close()
    finally:
        jax.profiler.stop_trace()
    assert caplog.text.count("no trace in") == 1


def test_time_to_save_comes_every_few_minutes():
    every = Every(0.05 / 60)
    assert not every.due(together=True)
    time.sleep(0.06)
    assert every.due(together=False)
    every.restart()
    assert not every.due(together=True)
    assert not Every(0).due(together=True)


def test_memory_in_use_is_plausible():
    assert 0.05 < memory_in_use()["host_gib"] < 100


def test_what_does_not_fit_into_memory_is_said_with_what_helps():
    with (
        pytest.raises(UserError, match=r"Out of memory.*accumulation.*now dots"),
        explain_memory_errors("dots"),
    ):
        jnp.zeros(1 << 46).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), explain_memory_errors("dots"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
