"""Trains and evaluates the runs of a study in child processes, several at once, and shares them with other processes.

A job goes through all runs and does each that is neither done nor in use: a lock file in the run's folder, which its
child processes hold as well, keeps other jobs out, wherever they run. What a kill cuts off is resumed, because training
and evaluation resume by themselves.
"""

import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from fusion_jax.errors import AGAIN, RunAgain
from fusion_jax.files import shown
from fusion_jax.studies import report
from fusion_jax.studies.config import StudyConfig, Variant, as_argument
from fusion_jax.studies.folder import Folder, Run, runs_of, write_json
from fusion_jax.training import lock
from fusion_jax.training.metrics import duration

log = logging.getLogger("fusion_jax")

LOCK = "study.lock"
_POLL = 0.2  # seconds between two looks at a child process
_WAIT = 1.0  # seconds between two attempts to get a lock that is soon free
_GRACE = 120.0  # seconds that a child may take to save after a request to stop


class _Failed(Exception):
    """A child process failed; the message is the last line of its log."""


class _Stopped(Exception):
    """A child process ended early, because it was asked to."""


@dataclass
class Work:
    """The work on a study in this process.

    Attributes:
      stop: set to end it: children save, and jobs return.
      failed: the last line of the log of each run that failed here, by the run's name.
      stopped: why, where a run was stopped from outside.
    """

    study: StudyConfig
    variants: list[Variant]
    folder: Folder
    stop: threading.Event = field(default_factory=threading.Event)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str = ""

    def __post_init__(self):
        self.runs = runs_of(self.study, self.variants)
        self._start, self._left_before = time.monotonic(), len(self.left)

    def do(self, jobs: int) -> None:
        """Does all runs that no other process does, `jobs` at once.

        Raises:
          RunAgain: a run was stopped from outside, after it had saved.
          KeyboardInterrupt: children have saved before it is raised.
        """
        log.info("%d of %d runs are done", len(self.runs) - self._left_before, len(self.runs))
        with ThreadPoolExecutor(jobs, "job") as pool:
            waiting = {pool.submit(self._job) for _ in range(jobs)}
            try:
                while waiting:
                    ended, waiting = wait(waiting, _POLL)
                    for job in ended:
                        job.result()
            finally:
                self.stop.set()  # after an error or Ctrl-C; no job is left otherwise
        if self.stopped:
            raise RunAgain(f"{self.stopped}; the same command goes on from here.")

    @property
    def left(self) -> list[Run]:
        """Runs that are not done, whether they failed here or another process does them."""
        return [run for run in self.runs if not self.folder.is_done(run)]

    def _job(self) -> None:
        for run in self.runs:
            workdir = self.folder.workdir(run.variant.name, run.seed)
            if self.stop.is_set():
                return
            if self.folder.is_done(run) or run.name in self.failed:
                continue
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                with lock.hold(workdir, LOCK) as held:
                    if not self.folder.is_done(run):
                        self._do_run(run, held)
            except lock.InUse:
                continue

    def _do_run(self, run: Run, held: int) -> None:
        try:
            if self.study.data:
                for seed in dict.fromkeys((run.seed, 0)):  # the questions are those of the first seed
                    self._draw(seed)
            self._train(run, held)
            for variant in run.evaluated:
                self._evaluate(run, variant, held)
        except _Failed as error:
            self.failed[run.name] = str(error)
            log.error("%s: failed; the other runs go on: %s", run.name, error)
            return
        except _Stopped as stopped:
            if not self.stop.is_set():
                self.stopped = f"{run.name}: {stopped}"
                self.stop.set()
            return
        log.info("%s: done; %s", run.name, self._progress())
        report.write(self.study, self.variants, self.folder)

    def _draw(self, seed: int) -> None:
        """Draws the data of a seed, or waits for the job that draws them."""
        folder, done = self.folder.data(seed), self.folder.data_done(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not done.exists():
            if self.stop.wait(0):
                raise _Stopped("stopped")
            try:
                with lock.hold(folder.parent, f"{seed}.lock") as held:
                    if not done.exists():
                        log.info("data of seed %d: drawing", seed)
                        command = ["synthesize", f"--config={self.study.data}", f"--config.seed={seed}"]
                        seconds = self._child([*command, f"--out={folder}"], folder.with_suffix(".log"), held)
                        write_json(done, {"seconds": seconds})
            except lock.InUse:
                self.stop.wait(_WAIT)

    def _train(self, run: Run, held: int) -> None:
        name, seed = run.variant.name, run.seed
        workdir, done = self.folder.workdir(name, seed), self.folder.trained(name, seed)
        if done.exists():
            return
        log.info("%s: training", run.name)
        changes = {"seed": seed} | run.variant.changes
        seconds = self._child(
            [
                "train",
                f"--config={self.folder.with_data(self.study.base, seed)}",
                *(f"--config.{key}={self.folder.with_data(as_argument(v), seed)}" for key, v in changes.items()),
                f"--workdir={workdir}",
            ],
            workdir / "train.log",
            held,
        )
        write_json(done, {"seconds": seconds})
        log.info("%s: trained in %s", run.name, duration(seconds))

    def _evaluate(self, run: Run, variant: Variant, held: int) -> None:
        folder, done = self.folder.evaluation(variant.name, run.seed), self.folder.evaluated(variant.name, run.seed)
        if done.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        how = variant.evaluation
        seconds = self._child(
            [
                "evaluate",
                f"--checkpoint={self.folder.workdir(run.variant.name, run.seed)}",
                f"--tasks={','.join(how.tasks)}",
                f"--data_dir={self.folder.with_data(how.data_dir, 0)}",
                f"--out={folder}",
                f"--limit={how.limit}",
                f"--rule={how.rule}",
                f"--guide={how.guide}",
                f"--batch_size={how.batch_size}",
            ],
            folder / "evaluate.log",
            held,
        )
        write_json(done, {"seconds": seconds})

    def _child(self, arguments: list[str], log_file: Path, held: int) -> float:
        """Runs a command of this package to its end and returns its seconds; its output is added to the log.

        Args:
          held: the descriptor of a lock, which the child holds as well: it may outlive this process.

        Raises:
          _Failed: its exit code is not 0.
          _Stopped: it ended on request, with its work saved.
        """
        command = [sys.executable, "-m", f"fusion_jax.{arguments[0]}", *arguments[1:]]
        programs = {"JAX_COMPILATION_CACHE_DIR": str(self.folder.path.absolute() / "compiled")}
        start = time.monotonic()
        with open(log_file, "ab") as output:
            begin = output.tell()
            output.write(f"$ python {shlex.join(command[1:])}\n".encode(errors="replace"))
            output.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=programs | os.environ,
                pass_fds=(held,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then asks its children to stop
            )
            while (code := process.poll()) is None:
                if self.stop.wait(_POLL):
                    process.terminate()
                    _end(process)
                    raise _Stopped("stopped")
        if code == AGAIN:
            raise _Stopped(_last_line(log_file, begin))
        if code:
            raise _Failed(f"{_last_line(log_file, begin)} (exit code {code}; see {log_file})")
        return time.monotonic() - start

    def _progress(self) -> str:
        """How many runs are done, and the time that the others take at the pace of all processes since the start."""
        left = len(self.left)
        text = f"{len(self.runs) - left} of {len(self.runs)} runs"
        pace = (time.monotonic() - self._start) / max(self._left_before - left, 1)
        return f"{text}, about {duration(pace * left)} left" if left else text


def _end(process: subprocess.Popen) -> None:
    """Waits for a child that was asked to stop, and kills it where it takes too long."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(path: Path, begin: int) -> str:
    """The last line that a child wrote after `begin`, without its progress bars."""
    with open(path, "rb") as file:
        file.seek(begin)
        lines = [line.rsplit("\r", 1)[-1].strip() for line in file.read().decode(errors="replace").splitlines()[1:]]
    return shown(next((line for line in reversed(lines) if line), "it wrote nothing"), 300)
