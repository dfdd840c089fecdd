"""A new kind as docs/synthesis.md adds one, in the default backend; and kinds that it cannot answer."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_jax.errors import UserError
from fusion_jax.synth import kinds
from fusion_jax.synth.backends.config import ImageConfig
from fusion_jax.synth.config import PoolConfig, SelectConfig, SynthConfig
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.base import TEXT, listed, obj
from fusion_jax.synth.run import synthesize

DOCS = Path(__file__).parents[2] / "docs" / "synthesis.md"


def riddle():
    """The kind that the docs show."""
    (code,) = re.findall(r"```python\n(\"\"\"Riddles.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {}
    exec(compile(code, "riddle.py", "exec"), namespace)
    return namespace["KIND"]


def run(monkeypatch, out, kind, captions=12) -> dict:
    monkeypatch.setitem(KINDS, kind.name, kind)
    config = SynthConfig(
        pools=(PoolConfig(path=f"embedded:{captions}"),),
        kinds={kind.name: 1.0},
        images=ImageConfig(width=96, height=96),
        select=SelectConfig(image_distance=-1),
        shards=False,
    )
    return synthesize(config, out, progress=False)


def test_every_kind_is_listed_once():
    folder = Path(kinds.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "common"}
    assert sorted(kinds.NAMES) == sorted(files) == sorted(kind.name for kind in KINDS.values())


def test_a_kind_added_as_the_docs_say_runs_with_the_embedded_backend(tmp_path, monkeypatch):
    manifest = run(monkeypatch, tmp_path / "out", riddle())
    assert manifest["records"]["stage2"] >= 10
    records = json.loads((tmp_path / "out" / "stage2.json").read_text())
    assert all(2 <= len(record["conversations"]) <= 8 for record in records)
    assert "riddle" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("form", ["caption", "two images", "options"])
def test_kinds_with_the_other_forms_run_too(tmp_path, monkeypatch, form):
    like = {"caption": "caption_scene", "two images": "contrast_short", "options": "multi_choice"}[form]
    kind = replace(KINDS[like], name="mine")
    if form == "caption":  # its own keys are no other kind's
        ask = replace(kind.describe, schema=obj(caption=TEXT), check=lambda value, data: value)
        kind = replace(kind, describe=ask)
    assert sum(run(monkeypatch, tmp_path / "out", kind)["records"].values()) >= 10


def test_a_form_that_the_embedded_backend_cannot_write_is_a_sentence(tmp_path, monkeypatch):
    kind = riddle()
    with pytest.raises(UserError, match="qa: no_such_kind 12"):
        odd = replace(kind.ask, schema=obj(steps=listed(TEXT)))
        run(monkeypatch, tmp_path / "steps", replace(kind, ask=odd))
    with pytest.raises(UserError, match=r"describe: no_such_kind 12.*of kind 'riddle'.*another backend"):
        run(monkeypatch, tmp_path / "plan", replace(kind, describe=replace(kind.describe, schema=obj(plan=TEXT))))
