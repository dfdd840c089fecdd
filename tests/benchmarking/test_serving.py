"""The benchmark of the server: the real server of a tiny checkpoint over HTTP, beside the batch job."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from helpers.server_process import ROOT, make_checkpoint

from fusion_jax.benchmarking import serving
from fusion_jax.errors import UserError

FLAGS = "--lengths=80 --question_lengths=64 --rounds=1 --images=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    return folder


def benchmark(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "fusion_jax.benchmark",
        "serve",
        "--checkpoint",
        folder,
        "--rows=2",
        "--requests=5",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "FUSION_API_KEY": "of another server"}
    return subprocess.run(
        [*map(str, command), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_server_and_batch_job_stand_in_one_table_and_line(folder):
    done = benchmark(folder, "--max_tokens=9", f"--server_flags={FLAGS}")
    assert done.returncode == 0, done.stderr
    *_, last = lines = done.stdout.splitlines()
    figures = json.loads(last)
    assert (figures["benchmark"], figures["requests"], figures["rows"]) == ("serve", 5, 2)
    assert [level["clients"] for level in figures["server"]] == [1, 4, 16]
    for level in (*figures["server"], figures["answerer"]):
        # Random weights rarely end an answer early: all levels have the same prompts and nearly the same answers.
        assert 1 < round(level["tokens_per_second"] / level["requests_per_second"], 6) <= 9
    for level in figures["server"]:
        assert 0 < level["first_token_median"] <= level["first_token_p95"] < 60
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 5 and table[1].startswith("| server, 1 clients | ") and "Answerer, 2 rows" in table[4]
    assert "16 clients: 5 of 5 requests answered" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_goes_wrong_is_one_sentence(folder):
    done = benchmark(folder, "--server_flags=--lengths=3 --rounds=1 --images=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: The server refuses request 0: ")
    done = benchmark(folder, "--server_flags=--latents=5")
    assert done.stderr.splitlines()[-1].startswith("error: The server has ended with code 2: ")
    assert "l^2 = 5 is not one of the model's latent counts" in done.stderr.splitlines()[-1]


def test_server_needs_a_checkpoint_or_a_run(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fusion_jax.benchmark", "serve"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "--checkpoint DIR or a run's --config" in done.stderr


def test_percentile_is_a_measured_value():
    assert serving.percentile([3.0]) == 3.0
    assert serving.percentile(range(1, 101)) == 95 and serving.percentile(range(1, 21)) == 19


def test_server_that_hangs_up_gives_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=5)
        with pytest.raises(UserError, match="The connection of request 7 broke"):
            serving.request(connection, b"{}", "request 7")
