"""Endpoints over real HTTP that fail as real ones do: nothing is lost, doubled or paid for twice; keys stay secret."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import model_server, tile_world
from helpers.synth_run import OUTPUT, make_config, run

from fusion_jax.errors import UserError
from fusion_jax.synth import blocks

ROOT = Path(__file__).parents[2]
KEY = "sk-a-very-secret-key"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_caption_ends_once_and_the_server_is_kept_busy(tmp_path):
    count, rate, concurrency = 150, 45.0, 24
    with model_server.running(key=KEY, faults=0.2, rate=rate, latency=0.05, hang=2) as url:
        # A hanging request is given up after 0.8 s.
        traffic = {"concurrency": concurrency, "requests_per_second": rate, "timeout": 0.8}
        manifest = run(make_config(tmp_path, url, count, traffic=traffic, shards=False), tmp_path / "out")
        seen = model_server.stats(url)
    faults = {name: seen["events"].get(name, 0) for name in ("429", "500", "hang", "cut", "malformed", "refusal")}
    assert min(faults.values()) > 0
    assert sum(faults.values()) == pytest.approx(0.2 * seen["events"]["admitted"], rel=0.25)

    # Each caption is a record or has a reason, and is there once.
    made, lost = lines(tmp_path / "out" / "lineage.jsonl"), lines(tmp_path / "out" / "dropped.jsonl")
    assert sorted(int(one["id"].split("-")[0]) for one in made + lost) == list(range(count))
    assert len(made) == sum(manifest["records"].values())
    assert all(one["stage"] and one["reason"] for one in lost)
    assert len(made) >= 0.95 * count

    assert seen["most_in_flight"] <= 3 * concurrency  # three models, each with its own places
    assert seen["answered_again"] == 0
    # No slower than 15% below what the server allows.
    assert seen["events"]["admitted"] / seen["seconds"] >= 0.85 * rate


def test_concurrency_is_kept(tmp_path):
    with model_server.running(latency=0.02) as url:
        config = make_config(tmp_path, url, 40, kinds=("conv_short",), traffic={"concurrency": 3})
        run(config, tmp_path / "out", stages=["pool", "filter", "judge", "describe"])
        assert model_server.stats(url)["most_in_flight"] == 3


def test_wrong_answers_go_and_right_ones_stay(tmp_path):
    with model_server.running(faults=0.2, wrong=0.2, hang=1) as url:
        kinds = ("conv_short", "conv_long", "multi_choice", "reasoning")
        config = make_config(tmp_path, url, 160, kinds=kinds, traffic={"timeout": 0.6})
        run(config, tmp_path / "out")
    wrong_kept = wrong = right_lost = right = 0
    samples = [one for one in blocks.all_samples(tmp_path / "out", 10) if "pairs" in one]
    for sample in samples:
        description = sample["descriptions"][0]
        for k, pair in enumerate(tile_world.questions(sample["kind"], [description], 0.0)["pairs"]):
            planted = tile_world.is_planted(description, k, 0.2)
            kept = any(one["question"] == pair["question"] for one in sample["pairs"])
            wrong, right = wrong + planted, right + (not planted)
            wrong_kept, right_lost = wrong_kept + (planted and kept), right_lost + (not planted and not kept)
            if kept and not planted:
                (said,) = [one for one in sample["pairs"] if one["question"] == pair["question"]]
                assert said["answer"] == pair["answer"]
    assert right + wrong > 500 and 0.15 < wrong / (right + wrong) < 0.25
    assert wrong_kept <= 0.01 * wrong
    assert right_lost <= 0.01 * right


def test_killed_again_and_again(tmp_path):
    """The output is that of an undisturbed run, and what the server had answered is asked for again by none but the
    requests that were under way when the process was killed."""
    places, kills = 6, 0
    with model_server.running(key=KEY, faults=0.2, hang=1, latency=0.03) as url:
        traffic = {"concurrency": places, "timeout": 0.6}
        config = make_config(tmp_path, url, 32, traffic=traffic)
        (tmp_path / "config.py").write_text(
            f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config!r})\n"
        )
        command = [sys.executable, "-m", "fusion_jax.synthesize", "--config", str(tmp_path / "config.py")]
        command += ["--out", str(tmp_path / "out")]
        answered = 0
        for _ in range(20):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while process.poll() is None:
                now = model_server.stats(url)["answered"]
                if kills < 3 and now >= answered + 40:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    kills, answered = kills + 1, now
                time.sleep(0.02)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
        assert kills == 3 and process.returncode == 0
        time.sleep(0.2)
        again = model_server.stats(url)["answered_again"]
    assert again <= kills * 3 * places
    with model_server.running(key=KEY, faults=0.2, hang=1) as url:
        undisturbed = make_config(tmp_path, url, 32, traffic=traffic)
        run(undisturbed, tmp_path / "whole")
    for name in OUTPUT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    images = [sorted(p.name for p in (tmp_path / run / "images").rglob("*.png")) for run in ("out", "whole")]
    assert images[0] == images[1] and images[0]

    # Run once more, nothing is asked at all.
    with model_server.running(key=KEY) as url:
        run(make_config(tmp_path, url, 32, traffic=traffic), tmp_path / "out")
        assert model_server.stats(url)["answered"] == 0


def test_keys_appear_nowhere(tmp_path, caplog, monkeypatch):
    with model_server.running(key=KEY) as url:
        config = make_config(tmp_path, url, 6)
        run(config, tmp_path / "out")
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
        monkeypatch.setenv("OPENAI_API_KEY", "sk-a-wrong-key")
        with pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY") as caught:
            run(config, tmp_path / "other")
        assert "sk-a-wrong-key" not in str(caught.value) and "***" in str(caught.value)
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
            run(config, tmp_path / "other")
    assert KEY not in caplog.text


def test_unusable_endpoints(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with model_server.running() as url:
        config = make_config(tmp_path, url, 4)

        def refused(says, **llm):
            with pytest.raises(UserError, match=says):
                run(config | {"llm": config["llm"] | llm}, tmp_path / f"out{len(says)}")

        refused(r"does not serve llm.model 'gpt-9'; it serves tile-painter, tile-viewer, tile-writer", model="gpt-9")
        refused("Give the endpoint's address in llm.base_url", base_url="")
        refused("must be http", base_url="ftp://host/v1")
        refused("must hold no name, password", base_url="https://me:secret@host/v1")
        refused(r"No answer from http://127.0.0.1:9", base_url="http://127.0.0.1:9/v1", timeout=0.5)


def test_an_endpoint_that_dies_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_jax.synth.backends.http._FIRST_WAIT", 0.01)
    traffic = {"retries": 1, "timeout": 1.0, "concurrency": 4}
    with model_server.running(faults=1.0, content=0, hang=0.1) as url:
        config = make_config(tmp_path, url, 80, kinds=("conv_short",), traffic=traffic)
        with pytest.raises(UserError, match=r"requests in a row.*the same command goes on from here"):
            run(config, tmp_path / "out")
    # The server is back: the very same command ends well.
    with model_server.running() as url:
        manifest = run(make_config(tmp_path, url, 80, kinds=("conv_short",), traffic=traffic), tmp_path / "out")
    assert set(manifest["dropped"]) <= {"refilter: character_repetition"}
    assert manifest["records"]["stage1_5"] >= 75


def test_retry_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_jax.synth.backends.http._DEAD_AFTER", 1000)
    with model_server.running(faults=0.3, content=0, hang=2) as url:
        config = make_config(tmp_path, url, 40, traffic={"retries": 0, "timeout": 1.0})
        first = run(config, tmp_path / "out")
        failed = [one for one in blocks.all_samples(tmp_path / "out", 3) if one.get("dropped", {}).get("again")]
        assert len(failed) > 10
    with model_server.running() as url:
        config = make_config(tmp_path, url, 40, traffic={"retries": 3})
        assert run(config, tmp_path / "out")["records"] == first["records"]
        second = run(config, tmp_path / "out", retry_failed=True)
    assert sum(second["records"].values()) >= 39


def test_without_structured_output(tmp_path, caplog):
    with model_server.running(plain=1) as url, caplog.at_level("INFO", "fusion_jax"):
        manifest = run(make_config(tmp_path, url, 12), tmp_path / "out")
    assert sum(manifest["records"].values()) >= 11
    assert "does not offer json_schema: json_object instead" in caplog.text
    assert "does not offer json_object: none instead" in caplog.text


def test_books(tmp_path):
    with model_server.running() as url:
        manifest = run(make_config(tmp_path, url, 10, kinds=("conv_short",)), tmp_path / "out")
        seen = model_server.stats(url)
    books = manifest["costs"]
    assert sum(line["replies"] for line in books.values()) == seen["answered"]
    line = books["judge tile-writer"]
    assert line["replies"] == 10 and line["cost"] == pytest.approx(10 * (100 * 1.0 + 20 * 2.0) / 1e6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"judge tile-writer.*?>10<", page)
