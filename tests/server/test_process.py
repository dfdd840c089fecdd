"""The server as a process: the memory that bodies take, a device that fails, exit codes."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.generation import QUESTIONS, config, weights

from fusion_jax.config import StageConfig
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.server import environment
from fusion_jax.synth.tokenizer import train_tokenizer
from fusion_jax.training import checkpoint, optim, state
from fusion_jax.training.about import describe_run
from fusion_jax.training.checkpoint_folders import FOLDER

TESTS = Path(__file__).parents[1]
SIZE = 30 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; its weights are not used."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = load_tokenizer(train_tokenizer([*QUESTIONS, "A red circle."], folder / "tokenizer", 400))
    tx = optim.optimizer(StageConfig(name="s", data=""), weights())
    saved = checkpoint.Checkpoints(folder / "s" / FOLDER, describe_run(config(), tokenizer))
    saved.finish(1, state.create(weights(), tx), {}, 10.0)
    return folder


@contextlib.contextmanager
def process(folder, log, *more, by=(), **environment):
    """(process, address) of a server without the page, started by a command such as launch/restart.sh."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--checkpoint", folder, "--port", port, "--nopage", "--rows", 2, "--queue", 40, "--max_tokens", 48]
    arguments += ["--lengths", 160, "--question_lengths", 64, "--rounds", 2, *more]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with log.open("w") as out:
        one = subprocess.Popen(
            [*by, sys.executable, TESTS / "helpers" / "echo_server.py", *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert one.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.1)
        yield one, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()


@pytest.fixture(scope="module")
def server(folder):
    with process(folder, folder / "log.txt", "--max_bodies_bytes", 64 << 20, "--drain_seconds", 2) as one:
        yield one


def post(address, body):
    """Status and error code."""
    try:
        with urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def output(text):
    return b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'


def peak(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def grown(pid, address, body):
    """Peak of resident memory while a body is sent, in its sizes; the answer."""
    post(address, output(b"Hi"))
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = peak(pid)
    answer = post(address, body)
    return (peak(pid) - before) / len(body), answer


def test_large_bodies_take_at_most_twice_their_size(server):
    one, address = server
    image = base64.b64encode(b"\x89PNG\r\n\x1a\n" + os.urandom(SIZE // 4 * 3))
    part = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%s"}}]}]}'
    bodies = {
        "empty objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
        "empty lists": b'{"a": [' + b"[]," * (SIZE // 3) + b"[]]}",
        "keys": b"{" + b'"":0,' * (SIZE // 5) + b'"":0}',
        "numbers": b'{"a": [' + b"1," * (SIZE // 2) + b"1]}",
        "one number": b'{"a": ' + b"1" * SIZE + b"}",
        "one text": output(b"a" * SIZE),
        "one text in four bytes a character": output(b"a" * SIZE + "\N{GRINNING FACE}".encode()),
        "escapes": output(rb"\"" * (SIZE // 2)),
        "spaces": b" " * SIZE + output(b"Hi"),
        "depth": b"[" * SIZE,
        "an open text": b'{"a": "' + b"a" * SIZE,
        "an image": part % (b"data:image/png;base64," + image),
        "an escaped image": part % (b"data:image\\/png;base64," + image.replace(b"/", b"\\/")),
        "a text like an image": output(b"data:image/png;base64," + image),
    }
    for name, body in bodies.items():
        times, (status, error) = grown(one.pid, address, body)
        print(f"{name}: {times:.2f} times its {len(body) >> 20} MB; {status} {error['code']}")
        assert times < 2.15, name  # a buffer or two of the connection's besides
        assert status == 400, (name, error)


def test_many_large_bodies_at_once_stay_within_their_memory(server):
    """--max_bodies_bytes is 64 MB, and what is being read takes at most twice as much for a moment."""
    one, address = server
    post(address, output(b"Hi"))
    Path(f"/proc/{one.pid}/clear_refs").write_text("5")
    before, statuses = peak(one.pid), []
    body = b'{"a": "data:;base64,' + b"A" * SIZE + b'"}'
    threads = [threading.Thread(target=lambda: statuses.append(_try(address, body))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {400, 429, None} and len(statuses) == 16
    assert peak(one.pid) - before < 3 * (64 << 20)
    assert post(address, output(b"Hi"))[0] == 200


def test_a_stopped_server_ends_well_whatever_its_callers_do(server):
    one, address = server
    host, port = address.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(20)]
    idle[0].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\nHost: x\r\n\r\n")
    one.send_signal(signal.SIGTERM)
    assert one.wait(15) == 0
    for each in idle:
        each.close()


def test_a_stream_that_outlasts_the_time_to_drain_ends_with_an_error(folder, tmp_path):
    log = tmp_path / "log.txt"
    with process(folder, log, "--drain_seconds", 1, ECHO_PACE="0.6") as (one, address):
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
        with urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=60) as answer:
            answer.readline()
            one.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            events = [line for line in answer.read().splitlines() if line]
        assert json.loads(events[-1].removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert 0.5 < time.monotonic() - begun < 8
        assert one.wait(15) == 0
    assert "Traceback" not in log.read_text() and "no request is open any more; bye" in log.read_text()


def test_the_launcher_starts_a_server_with_a_failed_device_again(folder, tmp_path):
    log, by = tmp_path / "log.txt", ["bash", TESTS.parent / "launch" / "restart.sh", "--pause", "1", "--"]
    with process(folder, log, by=by, ECHO_BREAKS="2") as (one, address):
        assert post(address, output(b"Hi"))[1]["code"] == "engine_failed"
        for _ in range(300):
            if log.read_text().count("listening on") == 2:
                break
            assert one.poll() is None, log.read_text()
            time.sleep(0.1)
        for _ in range(100):
            with contextlib.suppress(OSError):
                assert json.load(urllib.request.urlopen(f"{address}/health", timeout=5)) == {"status": "ok"}
                break
            time.sleep(0.1)
        short = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}'
        assert post(address, short)[0] == 200
        one.send_signal(signal.SIGTERM)
        assert one.wait(20) == 0
    assert "restart: exit code 75" in log.read_text()


def _try(address, body):
    """The status; None where the server closed the connection before it took all."""
    with contextlib.suppress(OSError):
        return post(address, body)[0]
    return None


def test_a_failed_device_answers_everybody_and_ends_with_a_code_to_start_again_on(folder, tmp_path):
    log, answers = tmp_path / "log.txt", []
    with process(folder, log, ECHO_PACE="0.3", ECHO_BREAKS="4") as (one, address):
        threads = [threading.Thread(target=lambda: answers.append(post(address, output(b"Hi")))) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.wait(15) == 75
    assert {(status, error["code"]) for status, error in answers} <= {(503, "engine_failed"), (503, "shutting_down")}
    assert all("the device is on fire" in error["message"] for _, error in answers)
    assert "The engine has failed: RuntimeError: the device is on fire. Start the server again." in log.read_text()


@pytest.mark.parametrize("given", [" ", "\t\n", "a\tb", "a b", "a\x00"])
def test_a_key_that_cannot_be_sent_is_refused(monkeypatch, given):
    monkeypatch.setattr(environment.os, "environ", {"FUSION_API_KEY": given})
    with pytest.raises(UserError, match="FUSION_API_KEY"):
        environment.api_key()


def test_keys_are_stripped_and_may_be_any_bytes(monkeypatch):
    for given, key in (("", ""), (" key\n", "key"), ("schlüssel", "schlüssel"), ("k\udcff", "k\udcff")):
        monkeypatch.setattr(environment.os, "environ", {"FUSION_API_KEY": given})
        assert environment.api_key() == key


def test_more_connections_than_files_are_refused():
    environment.check_open_files(1)
    with pytest.raises(UserError, match=r"--connections=1073741824 needs .*raise `ulimit -n`, or lower it"):
        environment.check_open_files(1 << 30)
