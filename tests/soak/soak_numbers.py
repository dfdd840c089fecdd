"""Gradients that are not finite and absurd learning rates: nothing of them stays."""

import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
from soak.soak_runs import PATIENCE, STAGES, STEPS, Lab, log_of, wait_for_step

from fusion_jax.errors import AGAIN
from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.loading import load_model

BEFORE = 10  # steps that are done in a sane way
GIVES_UP = 4  # steps skipped in a row
LARGE = 1e3  # a sane parameter of this model is far below
# Changes of tests/helpers/tiny_run.py.
CASES = {
    "learning rate 1e10": "learning_rate=1e10",
    "learning rate 1e30": "learning_rate=1e30",
    "learning rate 3e38": "learning_rate=3e38",
    "infinite loss": "infinite_loss=True",
}


def absurd_numbers(lab: Lab, scale: float = 1.0, cases=tuple(CASES)) -> str:
    """In a run that was sane so far, and in a new one; then the same workdir with sane numbers again."""
    begun = lab.folder / "sane"
    with lab.running(begun) as (process, _):
        wait_for_step(process, begun, STAGES[0], BEFORE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == AGAIN, log_of(begun).read_text()
    results = [f"{case}: {diverge(lab, case, begun)} / {diverge(lab, case, None)}" for case in cases]
    skipped = all_skipped(lab, begun)
    return f"{'; '.join(results)} (in mid-run / from the start); with sane numbers again every run ends well. {skipped}"


def diverge(lab: Lab, case: str, begun: Path | None) -> str:
    """What becomes of a run with absurd numbers. UserError or not: afterwards the workdir is as good as before."""
    workdir = lab.folder / f"{case.replace(' ', '_')}{'_in_mid_run' if begun else ''}"
    if begun:
        shutil.copytree(begun, workdir)
    # A save is due right after the step that ruins the parameters, and several more before the run gives up.
    changes = f"{CASES[case]},checkpoint_every=1,max_skipped_steps={GIVES_UP}"
    code, output = lab.run(workdir, changes=changes)
    errors = re.findall(r"^error: .*", output, re.MULTILINE)
    assert code in (0, 2) and len(errors) == (code == 2) and "Traceback" not in output, f"{case}: code {code}: {output}"
    assert code == 0 or f"max_skipped_steps={GIVES_UP}" in errors[0], errors
    if code == 0:
        _assert_finite(load_model(workdir).params)
        return "goes on"
    code, output = lab.run(workdir)
    assert code == 0, f"{case}: the run does not go on with a sane rate: {output}"
    _assert_finite(params := load_model(workdir).params, LARGE)
    last = read_rows(workdir / STAGES[-1] / "metrics.jsonl")[-1]
    assert last["step"] == STEPS and last["ce"] < 6, f"{case}: nothing was learned: {last}"
    return f"skipped, code 2 (parameters at most {max(float(np.abs(x).max()) for x in jax.tree.leaves(params)):.1f})"


def all_skipped(lab: Lab, begun: Path) -> str:
    """Where every step is skipped and the run puts up with it, the parameters stay what they were, bit for bit."""
    workdir = lab.folder / "all_skipped"
    shutil.copytree(begun, workdir)
    wanted = load_model(workdir)
    code, output = lab.run(workdir, changes=f"{CASES['infinite loss']},max_skipped_steps=1000")
    assert code == 0, output
    saved = load_model(workdir)
    for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_array_equal(a, b)
    counted = [read_rows(workdir / stage / "metrics.jsonl")[-1]["skipped"] for stage in STAGES]
    assert counted == [STEPS - wanted.step, STEPS], counted
    return f"{sum(counted):.0f} steps skipped in a row and counted: all parameters bit for bit as before"


def _assert_finite(params, most: float = np.inf) -> None:
    for value in map(np.asarray, jax.tree.leaves(params)):
        assert np.isfinite(value).all() and np.abs(value).max() < most, f"a parameter is {np.abs(value).max()}"
