"""The lock on a workdir: taken, refused, renewed, left behind by a dead run, and on odd file systems."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fusion_jax.errors import UserError
from fusion_jax.training import lock


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


def test_a_child_that_inherits_the_lock_keeps_it(tmp_path):
    with lock.hold(tmp_path, "other.lock") as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
        with lock.hold(tmp_path):  # another file is another lock
            pass
    try:
        with pytest.raises(lock.InUse), lock.hold(tmp_path, "other.lock"):
            pass
    finally:
        child.communicate(b"\n")
    with lock.hold(tmp_path, "other.lock"):
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
            assert ("ended without releasing it" in caplog.text) == (number == signal.SIGKILL)


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
