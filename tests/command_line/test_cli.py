"""What all commands share, with real processes: Ctrl-C, readers that go away, what terminals are shown."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from fusion_jax.command_line.cli import check_output
from fusion_jax.command_line.config_flag import _wrong_key
from fusion_jax.errors import UserError

ROOT = Path(__file__).parents[2]
COMMAND = """
import gc, logging, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fusion_jax.command_line import interrupts
from fusion_jax.command_line.cli import run_main
from fusion_jax.errors import RunAgain, UserError
log = logging.getLogger("fusion_jax")
def main(argv):
    kind = argv[1]
    if kind == "wait":
        Path(argv[2]).touch()
        time.sleep(60)
    elif kind == "import":  # of what would be left half made
        sys.path.append(argv[2])
        try:
            import slow
        finally:
            Path(argv[2], "cleaned").touch()
        time.sleep(60)
    elif kind in ("dropped", "gc"):  # where Python drops KeyboardInterrupt
        class Slow:
            def __del__(self):
                Path(argv[2]).touch()
                time.sleep(0.5)
        if kind == "gc":
            gc.callbacks.append(lambda *_: (Path(argv[2]).touch(), time.sleep(0.5)))
            gc.collect()
            gc.callbacks.clear()
        else:
            Slow()
        time.sleep(60)
    elif kind == "swallowed":  # as libraries do
        for k in range(100):
            try:
                Path(argv[2]).touch()
                time.sleep(0.05)
            except BaseException as error:
                if "raise" in argv:
                    raise RuntimeError("of a library") from error
                break
    elif kind == "goes on":
        for k in range(2):
            try:
                Path(argv[2] + str(k)).touch()
                time.sleep(60)
            except KeyboardInterrupt:
                interrupts.answered()
    elif kind == "threads":  # a pool with a thousand tasks waiting, and one that does not end
        pool = ThreadPoolExecutor(2)
        jobs = [pool.submit(time.sleep, 60 if k < 2 else 0.5) for k in range(1000)]
        Path(argv[2]).touch()
        jobs[0].result()
    elif kind == "say":
        for k in range(20000):
            print("a line of some length", k)
    elif kind == "log":
        for k in range(20000):
            log.info("a line of some length %d", k)
        Path(argv[2]).touch()
    elif kind == "both":
        print(1), log.info("2"), print(3)
    elif kind == "short":
        print("a line")
    elif kind == "again":
        log.info("a line")
        raise RunAgain("a sentence")
    elif kind == "mistake":
        log.info("a line")
        raise UserError("a sentence")
    elif kind == "odd":
        log.info("cut %s, \\x1b[2Jclear", "\\ud83d")
        raise UserError("a name \\x1b[31m \\udcff \\u202e " + "x" * 9000)
    elif kind == "open":
        open(argv[2])
    elif kind == "bug":
        {}["x"]
run_main(main, goes_on=lambda: "on" in sys.argv)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def start(*arguments, **settings):
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | settings
    return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], **settings)


def wait_for(path, process):
    end = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "stopped\n"), (["on"], "stopped; the same command goes on from here\n")]
)
def test_ctrl_c_is_one_line_and_130(tmp_path, arguments, said):
    process = start("wait", tmp_path / "begun", *arguments)
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", said)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("kind", "times"), [("dropped", 1), ("dropped", 2), ("gc", 1), ("swallowed", 1), ("swallowed raise", 1)]
)
def test_ctrl_c_is_not_lost(tmp_path, kind, times):
    """Python prints and drops what `__del__` and callbacks of the garbage collector raise; libraries catch it."""
    kind, *more = kind.split()
    process = start(kind, tmp_path / "begun", *more)
    wait_for(tmp_path / "begun", process)
    for _ in range(times):
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_the_end_of_an_import(tmp_path, times):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        "(here / 'begun').touch()\ntime.sleep(1)\n(here / 'imported').touch()\n"
    )
    process = start("import", tmp_path)
    wait_for(tmp_path / "begun", process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130
    for name in ("imported", "cleaned"):  # a second one ends all at once
        assert (tmp_path / name).exists() == (times == 1)


def test_what_answers_ctrl_c_goes_on(tmp_path):
    process = start("goes on", tmp_path / "begun")
    for k in range(2):
        wait_for(tmp_path / f"begun{k}", process)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_does_not_wait_for_threads(tmp_path, times):
    process = start("threads", tmp_path / "begun")
    wait_for(tmp_path / "begun", process)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    while times == 2 and process.poll() is None:  # impatiently
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
    assert time.monotonic() - begun < (4 if times == 2 else 15)


CONFIGURED = """
from absl import flags
from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, from_dict
define_config("run")
def main(argv):
    config = from_dict(RunConfig, flags.FLAGS.config.to_dict())
    stage = config.stages[0]
    print(config.seed, config.init_from, stage.epochs, stage.packing, stage.freeze, stage.learning_rate_by_path)
run_main(main)
"""


def configured(*overrides):
    command = [sys.executable, "-c", CONFIGURED, "--config", f"{ROOT}/tests/helpers/tiny_run.py:data"]
    command += [f"--config.{word}" for word in overrides]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def test_keys_that_the_config_file_does_not_list_can_be_set():
    names = ["seed=7", "init_from=a", "stages[0].epochs=3", "stages[0].packing", "stages[0].freeze=('^llm/',)"]
    done = configured(*names, "stages[0].learning_rate_by_path={'^llm/.*': 1e-3}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "7 a 3 True ('^llm/',) {'^llm/.*': 0.001}\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages[0].epoch=1", "config.stages[0].epoch is not a key; did you mean epochs?"),
        ("stages[0][0]=3", "--config.stages[0][0] cannot be set: config.stages[0] of the config file has no 0, "),
    ],
)
def test_what_cannot_be_set_is_said_in_one_sentence(override, said):
    done = configured("seed=1", override)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_what_cannot_be_set_is_named_with_what_there_is():
    config = ConfigDict({"model": {"layers": 1}, "stages": [ConfigDict({"steps": 1}), ConfigDict({"steps": 2})]})
    for word, said in (
        (
            "modle.layers=3",
            "--config.modle.layers cannot be set: config.modle is not a key; did you mean model?",
        ),
        ("model.layers.x=3", "config.model.layers of the config file has no 'x', but has no keys."),
        (
            "stages[7].steps=3",
            "config.stages of the config file has no 7, but has 2 entries, the first of which is [0].",
        ),
        ("stages[x].steps=3", "config.stages of the config file has no ('x',), but has 2 entries"),
        ("stages.0.steps=3", "--config.stages.0.steps is not a key; write --config.model.llm.layers or "),
        ("stages=()", "--config.stages cannot be set as a whole; set its parts, such as --config.stages[0].KEY=VALUE"),
        ("(" * 5000 + "=1", "is not a key"),
    ):
        found = _wrong_key(config, ["--config.model.layers=2", f"--config.{word}"])
        assert said in found and len(found) < 500 and found.isprintable()
    assert _wrong_key(config, ["--config.new=1", "--config.stages[-1].new=2", "--config.model.new.it=3"]) is not None
    assert _wrong_key(config, ["--config.new=1", "--config.stages[-1].new=2"]) is None
    assert "did you mean model?" in _wrong_key(config.lock(), ["--config.modle=1"])


@pytest.mark.parametrize("library", ["numpy", "jaxlib"])
@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("train --config=x --workdir=y", 1),
        ("convert import --from=x --out=y", 1),
        ("convert import --from=x --out=y", 2),
    ],
)
def test_ctrl_c_while_a_command_is_loaded(name, library, times):
    """JAX alone takes seconds. The signal comes in the middle of them, wherever the command imports it."""
    command = [sys.executable, "-m", *f"fusion_jax.{name}".split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while f"/{library}/" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


@pytest.mark.parametrize("kind", ["say", "log"])
def test_a_reader_that_goes_away_is_no_fault(tmp_path, kind):
    process = start(kind, tmp_path / "done")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(30)
    assert err == ""
    if kind == "log":  # a run goes on without its log
        assert process.returncode == 0 and (tmp_path / "done").exists()
    else:
        assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("kind", ["say", "short"])
def test_a_full_disk_under_standard_output_is_said(kind):
    with open("/dev/full", "w") as full:
        process = start(kind, stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "No space left" in err and err.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("kind", "code"), [("log", 0), ("mistake", 2), ("again", 75), ("bug", 1), ("short", 2), ("--no_such_flag", 2)]
)
def test_a_log_on_a_full_disk_leaves_the_exit_code_alone(tmp_path, kind, code, unbuffered):
    """Launchers go by it. Python itself would end with 120 where standard error keeps something to the end."""
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        assert start(kind, tmp_path / "done", stdout=full, stderr=full, env=environment).wait(30) == code


LOST = """
import jax
from fusion_jax.devices import board; from fusion_jax.training import stopping
class Gone:
    def key_value_try_get(self, name):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")
board.client = Gone
with stopping.end_together():
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: " + stopping._LOST[0])
"""


@pytest.mark.parametrize(("script", "code"), [("import fusion_jax\nfusion_jax.ended_early()", 130), (LOST, 75)])
def test_ends_that_pass_python_by_keep_their_code_on_a_full_disk(script, code):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=full, env=ENVIRONMENT, timeout=60)
    assert done.returncode == code


def test_log_and_results_come_out_in_order():
    out, _ = start("both", env=ENVIRONMENT | {"PYTHONUNBUFFERED": ""}).communicate(timeout=30)
    assert [line.split()[-1] for line in out.splitlines()] == ["1", "2", "3"]


def test_names_in_files_cannot_reach_the_terminal():
    out, err = (process := start("odd", env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})).communicate(timeout=30)
    assert process.returncode == 2
    assert r"cut \ud83d, \x1b[2Jclear" in out
    assert err.startswith(r"error: a name \x1b[31m \udcff \u202e x") and len(err) < 4000


@pytest.mark.parametrize(
    ("path", "said"),
    [("x" * 300, "File name too long"), ("/", "Is a directory"), ("/etc/passwd/x", "Not a directory")],
)
def test_paths_that_can_never_work_are_mistakes(path, said):
    _, err = (process := start("open", path)).communicate(timeout=30)
    assert process.returncode == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_where_a_result_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere/x")
    (tmp_path / "a.json").touch()
    for path in ("a.json", "b.json", tmp_path / "b.json", os.devnull, "./c"):
        check_output("output", path)
    for path in (".", tmp_path, "gone/a.json", "a.json/b", "x" * 300 + "/a", "link"):
        with pytest.raises(UserError, match="--output="):
            check_output("output", path)


def test_a_fault_of_our_own_keeps_its_traceback():
    for arguments in (["bug"], ["open", "gone"]):
        _, err = (process := start(*arguments)).communicate(timeout=30)
        assert process.returncode == 1 and "Traceback" in err
