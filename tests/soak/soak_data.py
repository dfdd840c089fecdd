"""Images and JSON files that change, break or vanish while a run reads them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from soak.soak_runs import STAGES, STEPS, Lab, assert_same, stopped, wait_for_step

from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.loading import load_model

CHANGES = "validate_every=4"
ENOUGH = 180  # seconds: a run that takes longer hangs


def _images(folder: Path) -> list[Path]:
    """Every second image."""
    return sorted(path for path in (folder / "images").rglob("*") if path.is_file())[::2]


def _lists(folder: Path) -> list[Path]:
    return [folder / f"{name}.json" for name in (*STAGES, "validation")]


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


def _halve(paths: list[Path]) -> None:
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)


def _empty(paths: list[Path]) -> None:
    for path in paths:
        os.truncate(path, 0)


def _garble(paths: list[Path]) -> None:
    """Other bytes in the same file, as many as before."""
    for path in paths:
        path.write_bytes(os.urandom(path.stat().st_size))


def _grow(paths: list[Path]) -> None:
    """Every record begins somewhere else in the same file."""
    for path in paths:
        path.write_text(json.dumps([{"id": "new"}] * 3 + json.loads(path.read_text()), indent=1))


def _replace(paths: list[Path]) -> None:
    """Another file of the same name."""
    for path in paths:
        path.with_suffix(".new").write_bytes(b"[]")
        path.with_suffix(".new").replace(path)


def _pipes(paths: list[Path]) -> None:
    """Named pipes, which would be read for ever."""
    _delete(paths)
    for path in paths:
        os.mkfifo(path)


def _folders(paths: list[Path]) -> None:
    _delete(paths)
    for path in paths:
        path.mkdir()


CASES = {
    "half of the images deleted": (_images, _delete),
    "half of the images cut": (_images, _halve),
    "half of the images empty": (_images, _empty),
    "half of the images garbage": (_images, _garble),
    "half of the images named pipes": (_images, _pipes),
    "half of the images folders": (_images, _folders),
    "JSON cut": (_lists, _halve),
    "JSON empty": (_lists, _empty),
    "JSON garbage": (_lists, _garble),
    "JSON rewritten": (_lists, _grow),
    "JSON replaced": (_lists, _replace),
    "JSON deleted": (_lists, _delete),
}


def changed_data(lab: Lab, scale: float = 1.0, cases=tuple(CASES), allowed=(0.9, 1.0)) -> str:
    """Each case once for each `allowed`, the share of bad records that the run puts up with."""
    undisturbed = lab.reference("changed_undisturbed", changes=CHANGES)
    results = []
    for case in cases:
        outcomes = [change(lab, case, share, undisturbed) for share in allowed]
        results.append(f"{case}: {' / '.join(dict.fromkeys(outcomes))}")
    return "; ".join(results) + ". Restored and started again, every run ends with code 0"


def change(lab: Lab, case: str, allowed: float, undisturbed: Path | None = None) -> str:
    """The data changes in the middle of the first stage; when the run has ended it is put back, and the run goes on.

    Args:
      undisturbed: what a run ends like that has met no bad record.
    """
    name = f"{case.replace(' ', '_')}_{allowed}"
    data, workdir = lab.folder / f"data_{name}", lab.folder / name
    shutil.copytree(lab.data, data)
    settings = {"data": data, "changes": f"{CHANGES},max_bad_records={allowed}"}
    files, action = CASES[case]
    with lab.running(workdir, **settings) as (process, output):
        wait_for_step(process, workdir, STAGES[0], 6)
        with stopped(process):
            action(files(data))
        try:
            code = process.wait(ENOUGH)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{case}: no end after {ENOUGH} s: {output()[-2000:]}") from None
        text = output()
    errors = re.findall(r"^error: .*", text, re.MULTILINE)
    assert code in (0, 2) and len(errors) == (code == 2) and "Traceback" not in text, f"{case}: code {code}: {text}"
    bad = [row for s in STAGES if (p := workdir / s / "bad_records.jsonl").exists() for row in read_rows(p)]
    shutil.rmtree(data)
    shutil.copytree(lab.data, data)
    again, text = lab.run(workdir, **settings)
    assert again == 0 and "damaged" not in text, f"{case}: the run does not go on: {text}"
    assert load_model(workdir).step == STEPS
    if code == 2:
        return "one sentence, code 2"
    assert bad or undisturbed is None or assert_same(workdir, undisturbed)
    rows = [row for row in read_rows(workdir / STAGES[-1] / "metrics.jsonl") if "ce" in row]
    assert any(row["samples_per_second"] for row in rows), f"{case}: a whole stage without a sample, and code 0"
    return "goes on, bad records counted" if bad else "as undisturbed"
