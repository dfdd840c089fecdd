"""Configurations of studies: the shipped ones, at both scales, and every mistake in one."""

from pathlib import Path

import pytest
from helpers import tiny_study

from fusion_jax.command_line.config_flag import load_config
from fusion_jax.errors import UserError
from fusion_jax.studies.config import as_argument, describe, first_difference, read_study
from fusion_jax.studies.folder import Folder, claim, runs_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in ROOT.glob("configs/study_*.py"))


def read(**changes):
    """The tiny study with some keys changed."""
    return read_study(tiny_study.get_config("data").to_dict() | changes)


@pytest.mark.parametrize("base", ["", ":configs/flare.py:l_3b", ":configs/fusion.py:8b,stage2"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_valid_at_both_scales(name, base, monkeypatch):
    monkeypatch.chdir(ROOT)
    study, variants = read_study(load_config(f"configs/{name}.py{base}").to_dict())
    assert "Expected: " in study.about and study.seeds >= 5
    assert len(variants) == len(study.variants) >= 3
    if not base:
        assert study.base == "configs/quickstart.py:{data}" and study.data
        plain = read_study({**load_config(f"configs/{name}.py").to_dict(), "steps_share": 1.0})[1]
        halved = [stage.steps for stage in variants[0].run.stages]
        assert halved == [round(stage.steps / 2) for stage in plain[0].run.stages]


def test_components_are_all_combinations_of_three(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, variants = read_study(load_config("configs/study_components.py").to_dict())
    parts = {
        v.name: (v.run.model.text_guided, v.run.model.mapping_loss_weight > 0, v.run.model.semantic_exchange)
        for v in variants
    }
    assert parts == {name: tuple(c in name.split("+") for c in "ABC") for name in parts} and len(parts) == 8


def test_variants_that_only_evaluate_in_another_way_share_the_runs():
    study, variants = read_study(tiny_study.get_config("data;guide").to_dict())
    assert [(v.name, v.trained_as, v.evaluation.guide) for v in variants] == [
        ("with A", "with A", "question"),
        ("without A", "without A", "question"),
        ("no question", "with A", "none"),
    ]
    runs = runs_of(study, variants)
    assert [(r.variant.name, r.seed) for r in runs] == [(n, s) for s in (0, 1) for n in ("with A", "without A")]
    assert [v.name for v in runs[0].evaluated] == ["with A", "no question"]


def test_the_rule_is_part_of_the_names_of_tasks():
    evaluation = {"data_dir": "x", "tasks": ["chartqa", "mmvp", "mmvp"], "rule": "published"}
    study, _ = read(evaluation=evaluation)
    assert study.evaluation.task_names == ["chartqa", "mmvp_published"]


def test_changed_keys_reach_the_run():
    variants = {"a": {}, "b": {"model.exchange.layers": 0, "stages[0].learning_rate": 1}}
    _, (a, b) = read(variants=variants, baseline="a", common={"log_every": 7}, steps_share=0.5, published=None)
    assert a.run.log_every == b.run.log_every == 7 and [s.steps for s in b.run.stages] == [2]
    assert (b.run.model.exchange.layers, b.run.stages[0].learning_rate) == (0, 1.0)
    assert a.run.stages[0].learning_rate == 0.01
    assert b.changes["stages[0].steps"] == 2
    assert [as_argument(v) for v in ("x", True, 0.5, (4,), [1, 2])] == ["x", "True", "0.5", "(4,)", "(1, 2)"]


A = {"with A": {}}
WRONG = {
    "variant 'b': config.model.txt_guided is not a key; did you mean text_guided?": {
        "variants": A | {"b": {"model.txt_guided": 1}}
    },
    "variant 'b': config.zeed is not a key; did you mean seed?": {"variants": A | {"b": {"zeed": 1}}},
    "variant 'b': config.model.text_guided must be bool": {"variants": A | {"b": {"model.text_guided": "no"}}},
    "variant 'b': model.mask='papr' is unknown": {"variants": A | {"b": {"model.mask": "papr"}}},
    "variant 'b': --config.stages[7].steps cannot be set": {"variants": A | {"b": {"stages[7].steps": 1}}},
    "variant 'b': model must be set to a number": {"variants": A | {"b": {"model": {"mask": "none"}}}},
    "variant 'with A': log_every must be set to a number": {"common": {"log_every": None}},
    "variant 'b': the seed is the study's own": {"variants": A | {"b": {"seed": 1}}},
    "variant 'b': key evaluation.'gide' is unknown": {"variants": A | {"b": {"evaluation.gide": "none"}}},
    "variant 'b': key evaluation.'limit' is unknown; allowed: guide": {"variants": A | {"b": {"evaluation.limit": 3}}},
    "evaluation.guide='non' is unknown": {"variants": A | {"b": {"evaluation.guide": "non"}}},
    "variant 'b': it is the same as the variant 'with A'": {"variants": A | {"b": {"model.text_guided": True}}},
    "needs an encoder that reads text": {
        "variants": A | {"b": {"model.text_guided": False, "evaluation.guide": "other"}}
    },
    "variants: give at least two": {"variants": A},
    "must be the name of a folder": {"variants": A | {"a/b": {}}},
    "baseline='with B' is unknown; allowed: with A, without A": {"baseline": "with B"},
    "seeds=0 must be from 1": {"seeds": 0},
    "seeds must be int": {"seeds": "5"},
    "steps_share=0.0 must be above 0": {"steps_share": 0.0},
    "steps_share=1.5 must be": {"steps_share": 1.5},
    "There is no config file": {"base": "configs/quickstrat.py"},
    "but no data are drawn": {"base": "configs/quickstart.py:{data}"},
    "evaluation.data_dir={data} names {data}": {"evaluation": {}},
    "task 'held' is unknown": {"evaluation": {"tasks": ["held"], "data_dir": "x"}},
    "evaluation.limit=-1": {"evaluation": {"limit": -1, "data_dir": "x"}},
    "config.bse is not a key; did you mean base?": {"bse": "x"},
    "has 1 figures for 2 columns": {"published": {"source": "", "columns": ["a", "b"], "rows": {"with A": [1.0]}}},
    "published.rows: variant 'B' is unknown": {"published": {"source": "", "columns": ["a"], "rows": {"B": [1.0]}}},
}


@pytest.mark.parametrize("says", WRONG, ids=range(len(WRONG)))
def test_mistakes_are_named(says):
    changes = WRONG[says]
    baseline = {"baseline": "with A", "published": None} if "variants" in changes else {}
    with pytest.raises(UserError) as raised:
        read(**{**baseline, **changes})
    assert says in str(raised.value)


def test_stages_of_epochs_have_no_share_of_steps(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"needs stages with steps, but stage1 of .* has epochs"):
        read(base="configs/flare.py:l_3b", steps_share=0.5)


def test_a_base_that_raises_is_named_with_its_line(tmp_path):
    base = tmp_path / "base.py"
    base.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"base.py, line 2: ZeroDivisionError"):
        read(base=str(base))
    base.write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match="must return a ConfigDict, not int"):
        read(base=str(base))


def test_a_folder_keeps_its_study(tmp_path):
    folder = Folder(tmp_path / "out")
    claim(folder, *read())
    # More seeds, other texts and another published table change no run.
    claim(folder, *read(seeds=7, about="Another text.", published=None))
    without = {"without A": {"model.text_guided": False, "log_every": 3}}
    for key, changes in {
        "variants.without A.run.log_every": {"variants": A | without},
        "variants.with A.run.checkpoint_every": {"common": {"checkpoint_every": 3}},
        "variants.third": {"variants": A | {"without A": {"model.text_guided": False}, "third": {"log_every": 1}}},
        "evaluation.limit": {"evaluation": {"data_dir": "data", "limit": 3}},
        "baseline": {"baseline": "with A"},
    }.items():
        with pytest.raises(UserError, match=f"another value of {key}; give another --out"):
            claim(folder, *read(**changes))


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not the folder of a study and not empty"):
        claim(Folder(tmp_path), *read())
    with pytest.raises(UserError, match="not the folder of a study"):
        claim(Folder(tmp_path / "notes.txt"), *read())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        claim(Folder(tmp_path), *read())


def test_descriptions_hold_the_drawn_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    one, two = (
        describe(*read(base="tests/helpers/tiny_stage.py:{data}", data=f"configs/quickstart_data.py:{counts}"))
        for counts in ("4,4,4,2,6", "4,4,4,2,8")
    )
    assert first_difference(one, one) == "" and first_difference(one, two) == "data"
    assert first_difference(one["data_values"], two["data_values"]) == "pools"
