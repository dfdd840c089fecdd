"""A server that is asked to stop while answers are streamed, and while callers neither read nor finish asking."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from soak.soak_runs import PATIENCE, ROOT, Lab

ROWS, STREAMS = 4, 6  # two of the streams wait for a row
LONG = 8000  # tokens of an answer that outlasts a short drain
LATE = 30.0  # seconds beyond --drain_seconds within which the process must be gone, on a busy machine


def stop_with_streams(lab: Lab, scale: float = 1.0) -> str:
    """With time enough, with too little, and with callers who would keep the server for ever."""
    # Weights that were never trained: their answers do not end by themselves.
    checkpoint = lab.reference("untrained", changes="steps=1,warmup_ratio=0.0,learning_rate=1e-30")
    with _server(lab, checkpoint, drain=120) as (process, port):
        streams = [_Stream(port, 600) for _ in range(STREAMS)]
        seconds, refused = _stop(process, port, streams)
        ended = Counter(stream.end() for stream in streams)
        assert ended == {"done": STREAMS}, ended
        enough = f"{STREAMS} streams finish ({seconds:.0f} s), new requests: {refused}"
    with _server(lab, checkpoint, drain=2) as (process, port):
        streams = [_Stream(port, LONG) for _ in range(STREAMS)]
        seconds, _ = _stop(process, port, streams)
        assert seconds < 2 + LATE, f"{seconds:.0f} s"
        ended = Counter(stream.end() for stream in streams)
        assert ended == {"error event": ROWS, "status 503": STREAMS - ROWS}, ended
        short = "with 2 s for long ones those that ran end with an error event, those that waited with 503"
    with _server(lab, checkpoint, drain=2) as (process, port):
        deaf = [_ask(port, LONG, deaf=True) for _ in range(STREAMS)]
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in silent[::2]:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(2)  # the first answers fill the sockets
        seconds, _ = _stop(process, port, [])
        for connection in (*deaf, *silent):
            connection.close()
        assert seconds < 2 + LATE, f"{seconds:.0f} s"
    return f"{enough}; {short}; {STREAMS} callers that never read and 20 that never ask: gone after {seconds:.0f} s"


@contextlib.contextmanager
def _server(lab: Lab, checkpoint: Path, drain: int) -> Iterator[tuple[subprocess.Popen, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"checkpoint": checkpoint, "port": port, "rows": ROWS, "drain_seconds": drain, "max_tokens": LONG}
    flags |= {"lengths": 80, "question_lengths": 56, "rounds": 1, "request_timeout": PATIENCE}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(lab.cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "fusion_jax.serve", "--nopage", *(f"--{key}={v}" for key, v in flags.items())]
    path = lab.folder / "server.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, path.read_text()
            time.sleep(0.1)
        yield process, port
        assert "Traceback" not in path.read_text(), path.read_text()
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _stop(process: subprocess.Popen, port: int, streams: list["_Stream"]) -> tuple[float, str]:
    """SIGTERM as soon as text comes; seconds until the process is gone, and what new requests hear meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while sum(stream.begun for stream in streams) < min(ROWS, len(streams)):
        assert time.monotonic() < deadline, "no text came"
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    heard = _refusal(port)
    code = process.wait(PATIENCE)
    assert code == 0, f"exit code {code}"
    return time.monotonic() - begun, heard


def _refusal(port: int) -> str:
    try:
        with contextlib.closing(_ask(port, 8)) as connection:
            connection.settimeout(30)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 503, answer.status
            return "503"
    except OSError as error:
        return f"{type(error).__name__}"


def _ask(port: int, tokens: int, deaf: bool = False) -> socket.socket:
    """Sends a request for a stream. `deaf`: a small window, since nothing will be read."""
    connection = socket.socket()
    if deaf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", port))
    question = {"role": "user", "content": "What is red?"}
    body = json.dumps({"model": "fusion", "messages": [question], "max_tokens": tokens, "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length:"
    connection.sendall(f"{head} {len(body)}\r\n\r\n".encode() + body)
    return connection


class _Stream:
    """A request whose answer a thread reads to its end."""

    def __init__(self, port: int, tokens: int):
        self._lines, self._status = [], 0
        self._thread = threading.Thread(target=self._read, args=(_ask(port, tokens),), daemon=True)
        self._thread.start()

    def _read(self, connection: socket.socket) -> None:
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            self._status = answer.status
            while line := answer.readline():
                self._lines.append(line.decode())

    @property
    def begun(self) -> bool:
        """Whether text has come."""
        return self._status == 200 and len(self._lines) > 0

    def end(self) -> str:
        """How it ended: done, error event, status N (refused before any text), or cut off."""
        self._thread.join(PATIENCE)
        if self._status not in (0, 200):
            return f"status {self._status}"
        lines = [line for line in self._lines if line.strip()]
        if lines and lines[-1].strip() == "data: [DONE]":
            return "done"
        return "error event" if lines and '"error"' in lines[-1] else "cut off"
