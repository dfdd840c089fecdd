"""SIGKILL at random moments of everything that a run does; afterwards the same command goes on."""

import random
import re
import time
from collections import Counter
from pathlib import Path

from soak.soak_runs import PATIENCE, STAGES, Lab, assert_same, log_of, unfinished

from fusion_jax.training.checkpoint_folders import FOLDER, steps_in

STEPS, VALIDATE = 36, 4
CHANGES = f"steps={STEPS},validate_every={VALIDATE}"
AIMS = ("start", "restore", "step", "metrics", "save", "rename", "validation", "answers")
AT_ONCE = 0.05  # seconds: a folder renamed so shortly before the kill counts as a kill at the rename
_STEP = re.compile(rf"({'|'.join(STAGES)}) (\d+)/{STEPS}  total")


def random_kills(lab: Lab, scale: float = 1.0, seed: int = 0) -> str:
    """Thirty kills, spread over the run. Each aims at something that the run does, and hits a random moment of it.

    What a kill really hit is read from the log and the files that it leaves.
    """
    undisturbed = lab.reference("random_kills_undisturbed", changes=CHANGES)
    workdir, rng, count = lab.folder / "random_kills", random.Random(seed), max(2, round(30 * scale))
    aims = [AIMS[i % len(AIMS)] for i in range(count)]
    rng.shuffle(aims)
    total, startup, hits, files = len(STAGES) * STEPS, 10.0, Counter(), Counter()
    for number, aim in enumerate(aims):
        # Further on with every kill, so that each finds the run alive.
        target = int(0.9 * total * (number + rng.random()) / count)
        begun = time.monotonic()
        with lab.running(workdir, changes=CHANGES) as (process, output):
            if aim == "start":
                time.sleep(startup * rng.random())
            elif aim == "restore":
                _wait(process, output, lambda text: "parameters, " in text)
                time.sleep(0.5 * rng.random())
            else:
                _wait(process, output, lambda text: "compiling the step" in text)
                startup = time.monotonic() - begun
                _wait(process, output, lambda text, target=target: _done(text) >= target)
                _aim(aim, process, output, workdir, rng)
            assert process.poll() is None, f"run {number + 1} ended before its kill: see {log_of(workdir)}"
            process.kill()
            killed = time.time()
            process.wait()
        hits[phase := _phase(output())] += 1
        if phase not in ("the start", "restoring"):  # which still find what the kill before left
            files.update(_traces(workdir, killed))
    code, output = lab.run(workdir, changes=CHANGES)
    assert code == 0, output
    arrays = assert_same(workdir, undisturbed)
    assert len(hits) >= min(5, count // 3), f"the kills are not spread: {hits}"
    assert count < 30 or (files["with a checkpoint half written"] and files["at a rename"]), files
    spread = ", ".join(f"{n} in {phase}" for phase, n in hits.most_common())
    left = "".join(f", {n} {trace}" for trace, n in sorted(files.items()))
    return f"{count} kills ({spread}{left}); all {arrays} arrays, losses and validation rows as undisturbed"


def _aim(aim: str, process, output, workdir: Path, rng: random.Random) -> None:
    """Returns when what is aimed at has begun, and a random part of its usual length has passed."""
    reports, before = [workdir / stage / "metrics.jsonl" for stage in STAGES], output()
    if aim == "step":
        _wait(process, output, lambda text: _done(text) > _done(before))
        time.sleep(0.05 * rng.random())
    elif aim == "metrics":
        sizes = _sizes(reports)
        _wait(process, output, lambda _: _sizes(reports) != sizes, pause=0.0)
    elif aim == "save":
        _wait(process, output, lambda _: unfinished(workdir), pause=0.0)
        time.sleep(0.03 * rng.random())
    elif aim == "rename":
        saved = _saved(workdir)
        _wait(process, output, lambda _: _saved(workdir) - saved, pause=0.0)
    elif aim == "validation":
        _wait(process, output, lambda text: _phase(text) == "validation")
        time.sleep(0.05 * rng.random())
    elif aim == "answers":
        _wait(process, output, lambda text: _phase(text) == "sample answers")
        time.sleep(0.1 * rng.random())


def _wait(process, output, ready, pause: float = 0.001) -> None:
    """Returns when `ready` of the output is true, or the run has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not ready(output()):
        time.sleep(pause)


def _done(text: str) -> int:
    """Steps done so far, over both stages; 0 before the first one of this start."""
    stage, step = (_STEP.findall(text) or [(STAGES[0], 0)])[-1]
    return STAGES.index(stage) * STEPS + int(step)


def _phase(text: str) -> str:
    """What a start was doing, according to its last output."""
    last = text.splitlines()[-1] if text else ""
    step = _STEP.search(last)
    if "parameters, " not in text:
        return "the start"
    if step:
        return "training" if int(step[2]) % VALIDATE else "validation"
    if "validation ce" in last:
        return "sample answers"
    return "compiling" if " records, " in text else "restoring"


def _saved(workdir: Path) -> set[tuple[str, int]]:
    return {(s, step) for s in STAGES for step in steps_in(workdir / s / FOLDER)}


def _sizes(paths: list[Path]) -> list[int]:
    return [path.stat().st_size if path.exists() else 0 for path in paths]


def _traces(workdir: Path, killed: float) -> list[str]:
    """What the files in the workdir say of the moment of a kill."""
    folders = [workdir / stage / FOLDER / str(step) for stage, step in _saved(workdir)]
    traces = {
        "with a checkpoint half written": unfinished(workdir),
        "with an old checkpoint half deleted": list(workdir.glob(f"*/{FOLDER}/*.deleting")),
        "at a rename": [folder for folder in folders if 0 <= killed - folder.stat().st_ctime < AT_ONCE],
    }
    return [trace for trace, paths in traces.items() if paths]
