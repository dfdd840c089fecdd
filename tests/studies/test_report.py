"""Reports of finished and of half finished studies: figures that can be checked by hand, and files that can be read."""

import json
import re

import numpy as np
import pytest
from helpers import finished_study, tiny_study
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.studies import blocks, report, results
from fusion_jax.studies.config import read_study
from fusion_jax.studies.folder import Folder, claim


@pytest.fixture
def tiny(tmp_path):
    study, variants = read_study(tiny_study.get_config("data;guide").to_dict())
    folder = Folder(tmp_path / "out")
    claim(folder, study, variants)
    return study, variants, folder


def test_a_whole_report(tiny):
    study, variants, folder = tiny
    finished_study.finish(study, variants, folder, {"with A": 0.8, "without A": 0.4, "no question": 0.4})
    report.write(*tiny)
    found = json.loads((folder.path / "study.json").read_text())
    of = found["tasks"]["held_out"]
    assert of["questions"] == 120 and of["kinds"] == dict.fromkeys(finished_study.KINDS, 20) and not found["missing"]
    # Against the answers themselves.
    scores = {}
    for name in ("with A", "without A"):
        files = [folder.evaluation(name, seed) / "held_out" / "predictions.jsonl" for seed in (0, 1)]
        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        scores[name] = 100 * np.array([[row["score"] for row in run if "control" not in row] for run in rows])
        means = scores[name].mean(1)
        assert of["variants"][name]["accuracy"] == pytest.approx({"0": means[0], "1": means[1]})
        assert of["variants"][name]["mean"] == pytest.approx(means.mean())
        assert of["variants"][name]["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
        assert of["variants"][name]["kinds"]["count"]["mean"] == pytest.approx(scores[name][:, 1::6].mean())
        low, high = of["variants"][name]["interval"]
        assert low < means.mean() < high
    difference = of["variants"]["with A"]["difference"]
    assert difference["mean"] == pytest.approx((scores["with A"] - scores["without A"]).mean())
    assert difference["p_runs"] == pytest.approx(1 / 3) and difference["p_questions"] < 0.001
    # Two comparisons: the smaller p-value is doubled.
    assert difference["p_questions_holm"] == pytest.approx(2 * difference["p_questions"])
    assert difference["interval"][0] > 0 and "difference" not in of["variants"]["without A"]
    # 100 steps at half a second, fifty rows of 4 TFLOP.
    assert found["cost"]["with A"] == {"train_seconds": 50.0, "train_flops": 2e14, "evaluate_seconds": 9.5}
    assert found["runs"]["no question"]["1"]["workdir"] == "runs/with A/1"

    text, page = ((folder.path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for words in (
        "Expected: nothing.",
        "```text\npython -m",
        "| with A | 2 |",
        "minus without A",
        r"| 0.667 | \<0.001 |",
        "A table.",
    ):
        assert words in text
    assert "missing" not in text and "{" not in text.replace("{data}", "")
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) == 4 == page.count("data:image/png;base64,")
    for link in links:
        picture = np.asarray(Image.open(folder.path / link).convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 5, f"{link} shows nothing"


def test_a_half_finished_study_says_what_is_missing(tiny):
    _, variants, folder = tiny
    report.write(*tiny)
    text = (folder.path / "report.md").read_text()
    assert "0 of 6 are done" in text and "There are no scored answers yet." in text
    # A variant without the baseline, then with one seed of it.
    finished_study.write_run(variants[0], 0, folder, 0.5, 60)
    report.write(*tiny)
    assert "with A: 1; without A: 0, 1; no question: 0, 1" in (folder.path / "report.md").read_text()
    finished_study.write_run(variants[0], 1, folder, 0.5, 60)
    finished_study.write_run(variants[1], 1, folder, 0.5, 60)
    report.write(*tiny)
    of = json.loads((folder.path / "study.json").read_text())["tasks"]["held_out"]["variants"]
    assert of["with A"]["difference"]["seeds"] == 1 and of["with A"]["difference"]["p_runs_holm"] is None
    ours = [of[name]["accuracy"]["1"] for name in ("with A", "without A")]
    assert of["with A"]["difference"]["mean"] == pytest.approx(ours[0] - ours[1]), "only seed 1 is a pair"
    assert of["without A"]["std"] is None


def test_answers_to_other_questions_are_refused(tiny):
    _, variants, folder = tiny
    finished_study.write_run(variants[0], 0, folder, 0.5, 60)
    finished_study.write_run(variants[0], 1, folder, 0.5, 66)
    with pytest.raises(UserError, match=r"with A/1/held_out/predictions.jsonl answers other questions"):
        report.write(*tiny)


def test_damaged_files_are_named(tiny):
    _, variants, folder = tiny
    finished_study.write_run(variants[0], 0, folder, 0.5, 60)
    for name, content in (("summary.json", "{"), ("held_out/predictions.jsonl", '{"id": 3')):
        path = folder.evaluation("with A", 0) / name
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            report.write(*tiny)
        path.write_text(before)
    (folder.evaluation("with A", 0) / "summary.json").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*summary\.json"):
        report.write(*tiny)


def test_answers_without_scores_have_no_figures(tiny):
    _, variants, folder = tiny
    finished_study.write_run(variants[0], 0, folder, 0.5, 60)
    path = folder.evaluation("with A", 0) / "held_out" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": null'))
    report.write(*tiny)
    assert "There are no scored answers yet." in (folder.path / "report.md").read_text()


def test_metrics_after_a_restart_count_every_step_once(tiny):
    _, variants, folder = tiny
    workdir = folder.workdir("with A", 0)
    (workdir / "stage1").mkdir(parents=True)
    rows = [{"step": 4, "seconds_per_step": 2.0, "model_flops": 10.0}, {"step": 4, "validation/ce": 1.0}]
    rows += [{"step": 6, "seconds_per_step": 1.0, "model_flops": 5.0}, {"step": 8, "seconds_per_step": 1.0}]
    finished_study.write_rows(workdir / "stage1" / "metrics.jsonl", rows)
    assert results.training_cost(variants[0], workdir) == (12.0, 15.0)


def test_texts_stay_texts_in_both_forms():
    parts = [
        blocks.Heading("a <b> & *c*"),
        *blocks.paragraphs("One | two_three\nfour, `a_b`.\n\n    code <x>\n"),
        blocks.Table(("name", "figure"), [("<script>", "a|b"), ("---", "-1.0")]),
    ]
    text, page = blocks.markdown(parts), blocks.page("t", parts)
    assert (
        r"## a \<b\> & \*c\*" in text
        and r"One \| two\_three four, `a_b`." in text
        and "```text\n    code <x>\n```" in text
    )
    assert r"| \<script\> | a\|b |" in text
    assert (
        "<script>" not in page and "<h2>a &lt;b&gt; &amp; *c*</h2>" in page and "<pre>    code &lt;x&gt;</pre>" in page
    )
