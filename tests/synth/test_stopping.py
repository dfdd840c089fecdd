"""Runs that end early: what a mistake leaves behind, and what Ctrl-C does."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import model_server
from helpers.synth_run import OUTPUT, make_config, run

from fusion_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def mistakes(tmp_path, url):
    """Configs that cannot run, by what is wrong with them; one of them fails only after the captions were read."""
    config = make_config(tmp_path, url, 8, kinds=("conv_short",))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    pool = config["pools"][0]

    def changed(part, **more):
        return config | {part: config[part] | more}

    return {
        "captions": config | {"pools": [pool | {"path": str(tmp_path / "missing.txt")}]},
        "no captions": config | {"pools": [pool, pool | {"path": str(empty)}]},
        "address": changed("llm", base_url="http://127.0.0.1:9/v1", retries=1, timeout=0.3),
        "model": changed("llm", model="gpt-9"),
        "image model": changed("images", model="gpt-9"),
        "key": changed("vision", api_key_env="NO_SUCH_KEY"),
        "words": config | {"filters": {"flagged_words_file": str(tmp_path / "missing")}},
        "scorer": config | {"scorer": {"path": str(tmp_path / "missing")}},
        "ray": config | {"engine": "ray"},
    }


@pytest.mark.parametrize("there", ["missing", "below missing", "empty"])
def test_a_mistake_leaves_nothing_and_the_corrected_command_works(tmp_path, monkeypatch, there):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setattr("fusion_jax.synth.backends.http._FIRST_WAIT", 0.01)
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "a" / "b" / "out" if there == "below missing" else tmp_path / "out"
    if there == "empty":
        out.mkdir()
    with model_server.running(key="sk-1") as url:
        wrong = mistakes(tmp_path, url)
        before = listing(tmp_path)
        for name, config in wrong.items():
            with pytest.raises(UserError):
                run(config, out)
            assert listing(tmp_path) == before, name
        with pytest.raises(UserError, match="Unknown stage"):
            run(make_config(tmp_path, url, 8), out, stages=["paint"])
        with pytest.raises(UserError, match="run the stage `pool` first"):
            run(make_config(tmp_path, url, 8), out, stages=["filter"])
        assert listing(tmp_path) == before
        if there == "empty":
            assert run(make_config(tmp_path, url, 8, kinds=("conv_short",)), out)["records"] == {"stage1_5": 8}


def test_what_was_paid_for_stays_and_the_corrected_command_goes_on(tmp_path, monkeypatch):
    """An image model that is wrong shows only when the first image is asked for, after replies were paid for."""
    from fusion_jax.synth.backends.http import Client

    monkeypatch.setattr(Client, "check", lambda self: None)  # as with an endpoint that has no list of models
    out = tmp_path / "out"
    with model_server.running() as url:
        config = make_config(tmp_path, url, 8, kinds=("conv_short",), traffic={"concurrency": 2})
        with pytest.raises(UserError, match=r"does not serve 'gpt-9'.*images\.model"):
            run(config | {"images": config["images"] | {"model": "gpt-9"}}, out)
        paid = model_server.stats(url)["answered"]
        assert paid and any((out / "journal").glob("*.jsonl"))
        manifest = run(config, out)
        assert manifest["records"] == {"stage1_5": 8}
        assert manifest["config"]["images"]["model"] == "tile-painter"
        assert model_server.stats(url)["answered_again"] <= 2  # those under way when the run ended
    # A run with something to its name is not taken over by another config.
    with pytest.raises(UserError, match="another configuration"):
        run(config | {"seed": 3}, out)


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path):
    from fusion_jax.synth.folder import locked

    with model_server.running() as url, locked(tmp_path / "out"):
        with pytest.raises(UserError, match="Another process is working"):
            run(make_config(tmp_path, url, 8), tmp_path / "out")
        assert (tmp_path / "out" / "lock").exists()


def start(tmp_path, config, out):
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config!r})\n"
    )
    command = [
        sys.executable,
        "-m",
        "fusion_jax.synthesize",
        "--config",
        str(tmp_path / "config.py"),
        "--out",
        str(out),
    ]
    # A session of its own, so that the whole group can be interrupted as a terminal does.
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_ctrl_c_ends_requests_and_waits_and_the_run_goes_on(tmp_path):
    with model_server.running(latency=0.02, faults=0.3, content=0, hang=60) as url:
        # Hanging requests hold their places for longer than anybody waits after Ctrl-C.
        config = make_config(tmp_path, url, 24, traffic={"timeout": 120.0, "concurrency": 4})
        process = start(tmp_path, config, tmp_path / "out")
        while model_server.stats(url)["answered"] < 10 and process.poll() is None:
            time.sleep(0.05)
        begun = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
        assert time.monotonic() - begun < 10
        assert process.returncode == 130
    with model_server.running() as url:
        config = make_config(tmp_path, url, 24)
        run(config, tmp_path / "out")
        run(config, tmp_path / "whole")
    for name in OUTPUT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def members(group: int) -> list[str]:
    """The living processes of a group, by their lines in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            line = path.read_text()
            state, _, its_group = line.rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(line)
    return found


def test_ctrl_c_ends_worker_processes_without_their_traces(tmp_path):
    config = {
        "pools": [{"path": "embedded:shapes/train:3000"}],
        "kinds": {"conv_short": 1.0},
        "images": {"width": 64, "height": 64},
        "block": 16,
        "processes": 2,
        "shards": False,
    }
    process = start(tmp_path, config, tmp_path / "out")
    while not any((tmp_path / "out" / "images").glob("*/*.png")) and process.poll() is None:
        time.sleep(0.05)
    group = os.getpgid(process.pid)
    os.killpg(group, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "SpawnPoolWorker" not in said
    end = time.monotonic() + 10
    while left := members(group):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["state"] == "running"
