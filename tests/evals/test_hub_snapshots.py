"""Snapshots of the hub as people download them: a task reads its own config, whole and once, and says which."""

import logging

import pytest
from helpers.bench_files import Rule, cell, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals.prepare import prepare
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import evaluate_tasks, run_task

ONE = "00000-of-00001.parquet"


def scienceqa(count, image=True):
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": cell() if image else None}
    return [row] * count


def pope(split, count):
    return [
        {"question": f"Is there a {split} {n} dog?", "answer": "yes", "category": split, "image": cell()}
        for n in range(count)
    ]


def bench(question, count=2):
    row = {"question": question, "hint": "", "A": "x", "B": "y", "answer": "A", "category": "k", "image": cell()}
    return [row | {"index": n} for n in range(count)]


def cv(side, count=2):
    row = {"type": side, "task": "Count", "source": side, "question": "?", "choices": ["1", "2"], "answer": "(A)"}
    return [row | {"idx": n, "prompt": "?", "image": cell()} for n in range(count)]


def readme(folder, configs):
    """The front matter that `datasets` writes: configs with patterns by split."""
    lines = ["---", "license: mit", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {pattern}" for split, pattern in files]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A card", ""]))


def read(task, data):
    return prepare(TASKS[task], data)


@pytest.mark.parametrize("layout", ["uploaded", "converted", "readme", "cache"])
def test_scienceqa_reads_one_of_its_configs_and_says_which(tmp_path, layout):
    folder = tmp_path / "scienceqa"
    if layout == "cache":
        folder = tmp_path / "datasets--lmms-lab--ScienceQA" / "snapshots" / "0123abc"
        (tmp_path / "datasets--lmms-lab--ScienceQA" / "snapshots" / "older").mkdir(parents=True)
        (tmp_path / "datasets--lmms-lab--ScienceQA" / "refs").mkdir()
        (tmp_path / "datasets--lmms-lab--ScienceQA" / "refs" / "main").write_text("0123abc")
    for config, rows in (("ScienceQA-FULL", scienceqa(2) + scienceqa(1, False)), ("ScienceQA-IMG", scienceqa(2))):
        for split in ("test", "train"):
            name = f"{split}/0000.parquet" if layout == "converted" else f"{split}-{ONE}"
            write_parquet(folder / config / name, rows)
    if layout == "readme":
        splits = ("test", "train")
        readme(folder, {c: [(s, f"{c}/{s}-*") for s in splits] for c in ("ScienceQA-FULL", "ScienceQA-IMG")})
    one = read("scienceqa", tmp_path)
    assert len(one.questions) == 3 and [bool(q.pictures) for q in one.questions] == [True, True, False]
    assert one.source.config == "config ScienceQA-FULL, split test" and len(one.source.files) == 1
    assert one.source.folder == folder


def test_a_config_of_its_own_is_chosen_by_its_folder(tmp_path):
    for config, count in (("ScienceQA-FULL", 3), ("ScienceQA-IMG", 2)):
        write_parquet(tmp_path / config / f"test-{ONE}", scienceqa(count))
    assert len(read("scienceqa", tmp_path / "ScienceQA-IMG").questions) == 2


def test_mmbench_in_three_languages(tmp_path):
    for config, question in (("cc", "什么?"), ("cn", "哪里?"), ("en", "Where?")):
        write_parquet(tmp_path / "MMBench" / config / f"dev-{ONE}", bench(question))
        write_parquet(tmp_path / "MMBench" / config / f"test-{ONE}", bench(question, 1))
    for language, question in (("en", "Where?"), ("cn", "哪里?")):
        one = read(f"mmbench_{language}_dev", tmp_path)
        assert {q.text for q in one.questions} == {question} and len(one.questions) == 4
        assert one.source.config == f"config {language}, split dev"


def test_chinese_questions_are_no_english_benchmark(tmp_path):
    write_parquet(tmp_path / "mmbench" / "cn" / f"dev-{ONE}", bench("哪里?"))
    for data in (tmp_path, tmp_path / "mmbench" / "cn"):
        with pytest.raises(UserError, match="the questions are in Chinese, not in English"):
            read("mmbench_en_dev", data)


def test_pope_has_its_questions_twice(tmp_path):
    splits = ("random", "popular", "adversarial")
    for split in splits:
        write_parquet(tmp_path / "pope" / "Full" / f"{split}-{ONE}", pope(split, 2))
    assert len(read("pope", tmp_path).questions) == 6
    write_parquet(tmp_path / "pope" / "data" / f"test-{ONE}", [row for split in splits for row in pope(split, 2)])
    one = read("pope", tmp_path)
    assert len(one.questions) == 6 and one.source.config == "config default, split test"
    assert len({q.text for q in one.questions}) == 6


def test_half_of_a_config_is_no_benchmark(tmp_path):
    for split in ("random", "popular"):
        write_parquet(tmp_path / "pope" / "Full" / f"{split}-{ONE}", pope(split, 2))
    with pytest.raises(UserError, match=r"of the config Full \(popular, random\), and this task reads .*adversarial"):
        read("pope", tmp_path)


def test_hallusion_bench_has_its_questions_in_two_splits(tmp_path):
    row = {"category": "VS", "subcategory": "chart", "set_id": "0", "gt_answer": "1", "gt_answer_details": "so"}
    row |= {"question": "Is it?", "question_id": "0", "visual_input": "1", "figure_id": "1"}
    write_parquet(tmp_path / "data" / f"image-{ONE}", [row | {"image": cell()}])
    assert len(read("hallusion_bench", tmp_path).questions) == 1
    unseen = row | {"figure_id": "0", "visual_input": "0", "image": None}
    write_parquet(tmp_path / "data" / f"non_image-{ONE}", [unseen])
    assert [len(q.pictures) for q in read("hallusion_bench", tmp_path).questions] == [1, 0]


def test_both_questionnaires_about_documents_in_one_snapshot(tmp_path):
    for config, answer in (("DocVQA", "a"), ("InfographicVQA", "b")):
        for split in ("validation", "test"):
            row = {"questionId": "1", "question": "?", "answers": [answer], "image": cell()}
            write_parquet(tmp_path / "docvqa" / config / f"{split}-{ONE}", [row])
    for task, answer in (("docvqa", "a"), ("infovqa", "b"), ("docvqa_test", "a")):
        assert [q.reference for q in read(task, tmp_path).questions] == [[answer]]


def test_the_small_split_of_mathvista(tmp_path):
    row = {"question": "?", "question_type": "free_form", "answer_type": "integer", "answer": "3", "choices": None}
    for split, pid in (("testmini", "1"), ("test", "2")):
        write_parquet(tmp_path / "data" / f"{split}-{ONE}", [row | {"pid": pid, "decoded_image": cell()}])
    assert [q.id for q in read("mathvista", tmp_path).questions] == ["1"]


def test_cv_bench_needs_both_sides(tmp_path):
    write_parquet(tmp_path / "CV-Bench" / "test_2d.parquet", cv("2D"))
    write_parquet(tmp_path / "CV-Bench" / "test_3d.parquet", cv("3D"))
    assert len(read("cv_bench", tmp_path).questions) == 4
    sides = {"2D": [("test", "test_2d.parquet")], "3D": [("test", "test_3d.parquet")]}
    readme(tmp_path / "CV-Bench", {"default": [("test", "test*.parquet")], **sides})
    assert len(read("cv_bench", tmp_path).questions) == 4
    (tmp_path / "CV-Bench" / "test_3d.parquet").unlink()
    with pytest.raises(UserError, match="there are no 3D questions"):
        read("cv_bench", tmp_path)


def test_mmmu_is_divided_by_its_configs(tmp_path):
    def row(subject):
        row = {"id": f"validation_{subject}_1", "question": "?", "options": "['a', 'b']", "answer": "A"}
        return [row | {"question_type": "multiple-choice", "image_1": cell()}]

    for subject in ("Math", "Art_Theory"):
        write_parquet(tmp_path / "mmmu" / subject / f"validation-{ONE}", row(subject))
    write_parquet(tmp_path / "mmmu" / "vision" / f"validation-{ONE}", row("Math"))  # of another benchmark
    one = read("mmmu", tmp_path)
    assert [q.about["subject"] for q in one.questions] == ["Art_Theory", "Math"]
    assert one.source.config == "2 configs of 30, split validation"
    write_parquet(tmp_path / "whole" / "mmmu" / "data" / f"validation-{ONE}", row("Math"))
    assert len(read("mmmu", tmp_path / "whole").questions) == 1


def test_configs_that_nobody_knows_are_refused_with_the_choices(tmp_path):
    for config in ("a", "b"):
        write_parquet(tmp_path / "pope" / config / f"test-{ONE}", pope("random", 1))
    with pytest.raises(UserError, match=r"config a \(test\), the config b \(test\).*--data_dir=\S*/pope/a.*expected"):
        read("pope", tmp_path)
    assert len(read("pope", tmp_path / "pope" / "b").questions) == 1


def test_the_only_config_of_a_benchmarks_own_folder(tmp_path):
    write_parquet(tmp_path / "pope" / "mine" / f"test-{ONE}", pope("random", 1))
    assert read("pope", tmp_path).source.config == "config mine, split test"


def test_another_benchmarks_folder_is_not_read(tmp_path):
    row = {"index": 0, "question": "?", "answer": "A", "category": "c", "l2_category": "d", "image": cell()}
    write_parquet(tmp_path / "mmstar" / "mmstar.parquet", [row])
    assert len(read("mmstar", tmp_path).questions) == 1
    with pytest.raises(UserError, match=r"realworldqa: .*\(found: mmstar\)"):
        read("realworldqa", tmp_path)
    write_parquet(tmp_path / "ocrbench" / f"test-{ONE}", [{"question": "?", "answer": "A", "image": cell()}])
    with pytest.raises(UserError, match=r"of the config mmstar \(mmstar\), the config ocrbench \(test\)"):
        read("realworldqa", tmp_path)


@pytest.mark.parametrize(
    "names, message",
    [
        (["test-00001-of-00003.parquet"], "2 of the 3 files of the split test are missing, the first is number 00000"),
        (["test-00000-of-00002.parquet", "test-00000-of-00001.parquet"], "two versions of one split"),
        (["test-00000-of-00001-0a1b2c3d.parquet", "test-00000-of-00001.parquet"], "two versions of one split"),
    ],
)
def test_a_split_comes_whole_and_once(tmp_path, names, message):
    for name in names:
        write_parquet(tmp_path / "data" / name, pope("random", 1))
    with pytest.raises(UserError, match=message):
        read("pope", tmp_path)


def test_shards_are_read_in_order(tmp_path):
    for n in (1, 0):
        write_parquet(tmp_path / "data" / f"test-0000{n}-of-00002-0a1b2c3d.parquet", [pope("random", 2)[n]])
    assert [q.text for q in read("pope", tmp_path).questions] == [f"Is there a random {n} dog?" for n in (0, 1)]


def test_a_pointer_to_a_file_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"test-{ONE}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS"):
        read("pope", tmp_path)


def test_what_a_download_leaves_beside_the_files_is_no_data(tmp_path):
    write_parquet(tmp_path / "data" / f"test-{ONE}", pope("random", 1))
    for place in (".cache", "__MACOSX"):
        write_parquet(tmp_path / place / "data" / f"test-{ONE}", pope("popular", 1))
    assert len(read("pope", tmp_path).questions) == 1


def test_two_folders_of_one_benchmark_are_refused(tmp_path):
    for name in ("pope", "datasets--lmms-lab--POPE"):
        write_parquet(tmp_path / name / f"test-{ONE}", pope("random", 1))
    with pytest.raises(UserError, match=r"holds datasets--lmms-lab--POPE and pope; give the one that is meant"):
        read("pope", tmp_path)


def test_a_task_without_data_leaves_the_others_in_training(tmp_path, caplog):
    write_parquet(tmp_path / "pope" / f"test-{ONE}", pope("random", 2))
    with caplog.at_level(logging.WARNING, "fusion_jax"):
        figures = evaluate_tasks(Rule(lambda _: "yes"), ["mmvp", "pope"], tmp_path)
    assert figures["pope/accuracy"] == 100.0 and "mmvp: there is no file Questions.csv" in caplog.text
    with pytest.raises(UserError, match=r"mmvp: there is no file Questions.csv"):
        evaluate_tasks(Rule(str), ["mmvp"], tmp_path)


def test_a_test_split_in_place_of_the_validation_split_is_refused(tmp_path):
    rows = [{"question_id": "1.jpg", "question": "?", "answers": None, "image": cell()}]
    write_parquet(tmp_path / "data" / f"val-{ONE}", rows)
    with pytest.raises(UserError, match=r"vizwiz: there are questions without an answer.*row 0"):
        run_task(Rule(str), TASKS["vizwiz"], tmp_path, progress=False)


# By lmms-eval's configs and the benchmarks' own pages.
REPOSITORIES = {
    "ai2d": "ai2d", "chartqa": "ChartQA", "cv_bench": "CV-Bench", "docvqa": "DocVQA", "infovqa": "DocVQA", "mme": "MME",
    "hallusion_bench": "HallusionBench", "llava_wild": "llava-bench-in-the-wild", "mathvista": "MathVista",
    "mmbench_cn_dev": "MMBench", "mmbench_en_dev": "MMBench", "mme_realworld": "MME-RealWorld-Lmms-eval",
    "mme_realworld_cn": "MME-RealWorld-CN-Lmms-eval", "mme_realworld_lite": "MME-RealWorld-lite-lmms-eval",
    "mmmu": "MMMU", "mmstar": "MMStar", "mmvet": "MMVet", "mmvp": "MMVP", "ocrbench": "OCRBench", "pope": "POPE",
    "realworldqa": "RealWorldQA", "scienceqa": "ScienceQA", "seed_image": "SEED-Bench", "textvqa": "textvqa",
    "vizwiz": "VizWiz-VQA",
}  # fmt: skip


@pytest.mark.parametrize("task", REPOSITORIES)
def test_the_names_of_the_hubs_repositories_are_known(tmp_path, task):
    folder = tmp_path / f"datasets--lmms-lab--{REPOSITORIES[task]}" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=f"in {folder} "):
        read(task, tmp_path)
