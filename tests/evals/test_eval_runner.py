"""The engine: one answer for each question however often it stops and whoever helps, and files to look at."""

import json
import threading

import pytest
from helpers.bench_files import Rule, held_out_folder, pope_folder, write_image

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.evals import predictions, published, report, runner
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import Output, run_task

HEADER = {"checkpoint": "c0ffee", "folder": "runs/a/100"}
LABELS = {"random": ["yes", "no", "yes"], "popular": ["no", "no", "yes"], "adversarial": ["yes", "no"]}
POPE = TASKS["pope"]


@pytest.fixture
def data(tmp_path):
    return pope_folder(tmp_path / "pope_data", LABELS)


def sometimes(prompt):
    return "Yes" if "0" in prompt else "No."


def test_flat_figures_for_a_training_loop(data):
    answerer = Rule(sometimes)
    figures = runner.evaluate_tasks(answerer, ["pope"], data)
    assert figures["pope/questions"] == 8
    # random: yes no no of yes no yes; popular: yes no no of no no yes; adversarial: yes no of yes no.
    assert figures["pope/random_accuracy"] == pytest.approx(200 / 3)
    assert figures["pope/popular_accuracy"] == pytest.approx(100 / 3)
    assert figures["pope/accuracy"] == pytest.approx((200 / 3 + 100 / 3 + 100) / 3)
    assert answerer.lengths == {POPE.max_tokens} and answerer.max_tokens == 7
    assert max(answerer.batches) <= answerer.rows
    assert all(type(value) is float for value in figures.values())


def test_limit_spreads_over_the_benchmark(data):
    answerer = Rule(sometimes)
    figures = runner.evaluate_tasks(answerer, ["pope"], data, limit=4)
    assert figures["pope/questions"] == 4
    assert {split for split in LABELS if any(split in words for words in answerer.asked)} == set(LABELS)


def test_a_run_that_died_asks_only_what_is_missing(data, tmp_path):
    output = Output(tmp_path / "out", HEADER)
    answered = []

    def dies(prompt):
        if len(answered) == 5:
            raise KeyboardInterrupt
        answered.append(prompt)
        return sometimes(prompt)

    with pytest.raises(KeyboardInterrupt):
        run_task(Rule(dies, rows=1), POPE, data, output, progress=False)
    part = next((output.folder / "pope" / "parts").iterdir())
    with open(part, "ab") as file:
        file.write(b'{"id": "random/3", "prompt": "12')  # killed while writing
    again = Rule(sometimes)
    result = run_task(again, POPE, data, output, progress=False)
    assert len(again.asked) == 3 and not set(again.asked) & set(answered)
    fresh = run_task(Rule(sometimes), POPE, data, progress=False)
    assert result.scores == fresh.scores
    third = Rule(sometimes)
    assert run_task(third, POPE, data, output, progress=False).scores == fresh.scores
    assert third.asked == []


def test_changed_words_are_asked_again(data, tmp_path):
    output = Output(tmp_path / "out", HEADER)
    run_task(Rule(sometimes), POPE, data, output, progress=False)
    lines = data / "coco_pope_random.json"
    lines.write_text(lines.read_text().replace("random 1 dog", "random 1 cat"))
    again = Rule(sometimes)
    run_task(again, POPE, data, output, progress=False)
    assert len(again.asked) == 1 and "cat" in again.asked[0]


def test_processes_share_the_work_and_process_0_joins_it(data, tmp_path):
    alone = run_task(Rule(sometimes), POPE, data, progress=False)
    asked, results = [], {}

    def work(index):
        answerer = Rule(sometimes, rows=2)
        output = Output(tmp_path / "out", HEADER, index, 3, patience=20)
        results[index] = run_task(answerer, POPE, data, output, progress=False)
        asked.append(answerer.asked)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1] is None and results[2] is None
    assert results[0].scores == alone.scores
    assert [p.row() for p in results[0].predictions] == [p.row() for p in alone.predictions]
    assert sorted(map(len, asked)) == [2, 3, 3] and len({words for part in asked for words in part}) == 8


def test_process_0_says_when_the_others_are_gone_and_can_finish_alone(data, tmp_path):
    with pytest.raises(UserError, match=r"4 of 8 answers are missing .* --num_processes=1"):
        run_task(Rule(sometimes), POPE, data, Output(tmp_path / "out", HEADER, 0, 2, patience=0), progress=False)
    alone = Rule(sometimes)
    result = run_task(alone, POPE, data, Output(tmp_path / "out", HEADER), progress=False)
    assert len(alone.asked) == 4 and result.scores["questions"] == 8


def test_predictions_hold_everything_to_look_again(data, tmp_path):
    run_task(Rule(sometimes), POPE, data, Output(tmp_path / "out", HEADER), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "pope" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[2] == {
        "id": "random/3",
        "question": "Is there a random 2 dog?",
        "image": [str(data / "val2014" / "random_2.jpg")],
        "prompt": "Is there a random 2 dog?\nAnswer the question using a single word or phrase.",
        "answer": "No.",
        "parsed": "no",
        "reference": "yes",
        "score": 0.0,
        "about": {"split": "random"},
    }


def test_two_processes_with_one_number_do_not_mix(tmp_path):
    part = predictions.Part(tmp_path, 0, 1, HEADER)
    with pytest.raises(UserError, match="is being written by another process"):
        predictions.Part(tmp_path, 0, 1, HEADER)
    part.add("a", "what?", "this")
    part.close()
    predictions.Part(tmp_path, 0, 1, HEADER).close()
    assert predictions.read_answers(tmp_path) == {("a", predictions.digest("what?")): "this"}


def test_answers_of_another_checkpoint_are_refused(data, tmp_path):
    output = tmp_path / "out"
    run_task(Rule(sometimes), POPE, data, Output(output, HEADER), progress=False)
    predictions.check_folder(output, HEADER)
    other = {"checkpoint": "beef", "folder": "runs/b/7"}
    with pytest.raises(UserError, match=r"answers of another checkpoint \(runs/a/100\).*another --out") as error:
        predictions.check_folder(output, other)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another checkpoint"):
        run_task(Rule(sometimes), POPE, data, Output(output, other), progress=False)


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        for part in ("params/d/x", "about/y"):
            path = tmp_path / name / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    a, b, c = (predictions.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    (tmp_path / "a" / "train").mkdir()
    (tmp_path / "a" / "train" / "moments").write_text("gone after an export")
    assert predictions.fingerprint(tmp_path / "a") == a


def test_summary_and_report_stand_alone(data, tmp_path):
    output = tmp_path / "out"
    result = run_task(Rule(sometimes), POPE, data, Output(output, HEADER), progress=False)
    report.write(output, HEADER, [result])
    summary = json.loads((output / "summary.json").read_text())
    assert summary["checkpoint"] == "c0ffee"
    assert summary["tasks"]["pope"]["scores"]["accuracy"] == result.scores["accuracy"]
    table = (output / "summary.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| POPE | f1"))
    values = [cell.strip() for cell in row.strip("|").split("|")][2:]
    figures = ["88.8", "88.6", "89.1", "88.9", "88.7", "88.3", "89.3", "88.8", "88.5"]
    own, _, _ = next(row for row in published.ROWS if row.task == "pope").own({"pope": result.scores})
    assert values == [f"{own:.1f}", *figures, "8 of 9000 or 8910"] and own in result.scores.values()
    page = (output / "report.html").read_text()
    wrong = [p for p in result.predictions if p.score == 0]
    assert 0 < len(wrong) < 8
    assert page.count("<article>") == len(wrong) == page.count("data:image/jpeg;base64,")
    assert all(p.question.text in page for p in wrong)
    assert "http" not in page and "<script" not in page


def test_report_escapes_what_a_model_says(data, tmp_path):
    result = run_task(Rule(lambda _: "<b>not</b> a dog & no"), POPE, data, Output(tmp_path, HEADER), progress=False)
    report.write(tmp_path, HEADER, [result])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;not&lt;/b&gt; a dog &amp; no" in page and "<b>not" not in page


def test_a_later_run_of_another_task_keeps_the_first_in_summary_and_report(data, tmp_path):
    output = tmp_path / "out"
    for name, folder in (("pope", data), ("held_out", tmp_path / "held")):
        if name == "held_out":
            folder.mkdir()
            held_out_folder(folder, ["red", "blue"], ["colour", "colour"])
        result = run_task(Rule(sometimes), TASKS[name], folder, Output(output, HEADER), progress=False)
        report.write(output, HEADER, [result])
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["tasks"]) == ["held_out", "pope"]
    page = (output / "report.html").read_text()
    assert 'id="held_out"' in page and 'id="pope"' in page


def test_unknown_task_lists_all():
    with pytest.raises(
        UserError, match=r"task 'popes' is unknown; allowed: held_out, .*pope.*textvqa.*; did you mean pope"
    ):
        find_tasks(["pope", "popes"])


def test_tasks_are_taken_once_in_order():
    assert [task.name for task in find_tasks(["textvqa", "pope", "textvqa"])] == ["textvqa", "pope"]


def test_wrong_data_folder_says_what_is_expected_and_what_is_there(data, tmp_path):
    with pytest.raises(UserError, match=r"pope: there is no data folder .*nowhere; expected coco_pope_"):
        run_task(Rule(sometimes), POPE, tmp_path / "nowhere", progress=False)
    (data / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match=r"no file coco_pope_popular.json in .*found: coco_pope_adv.*expected coco_"):
        run_task(Rule(sometimes), POPE, data, progress=False)


def test_missing_images_are_said_before_anything_is_asked(data):
    (data / "val2014" / "popular_1.jpg").unlink()
    answerer = Rule(sometimes)
    with pytest.raises(
        UserError, match=r"1 of 8 images are missing, the first is .*popular_1.jpg \(question popular/2"
    ):
        run_task(answerer, POPE, data, progress=False)
    assert answerer.asked == []


def test_an_image_that_cannot_be_read_names_question_and_file(data):
    def refuses(prompts):
        raise BadRecord("corrupt_image", prompts[0].where, f"cannot decode the image {prompts[0].images[0]}")

    answerer = Rule(sometimes)
    answerer.answer = refuses
    with pytest.raises(UserError, match=r"pope, question .*: cannot decode the image .*jpg") as error:
        run_task(answerer, POPE, data, progress=False)
    assert "\n" not in str(error.value)


def test_data_may_lie_in_a_folder_of_its_name(data, tmp_path):
    (tmp_path / "all").mkdir()
    data.rename(tmp_path / "all" / "POPE")
    assert run_task(Rule(sometimes), POPE, tmp_path / "all", progress=False).scores["questions"] == 8


def test_report_shows_words_for_an_image_it_cannot_read(tmp_path):
    from fusion_jax.evals.task import picture

    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert report.thumbnail(picture(tmp_path / "a.png")).startswith("<img")
    assert "no image of a known format" in report.thumbnail(picture(tmp_path / "b.png"))
