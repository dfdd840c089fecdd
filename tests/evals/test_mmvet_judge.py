"""MM-Vet's submission and grades, and the judge behind a real local endpoint: retries, refusals, and a silent key."""

import json
import logging
import time

import pytest
from helpers.bench_files import Rule, write_image, write_json
from helpers.judge_endpoint import KEY
from helpers.raw_server import answer, says, serving

from fusion_jax.errors import UserError
from fusion_jax.evals import judge, mmvet
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.runner import Output, run_task


@pytest.fixture
def data(tmp_path):
    rows = {
        "v1_0": {"imagename": "a.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "b.png", "question": "What is it?", "answer": "dog<OR>puppy", "capability": ["rec"]},
        "v1_2": {"imagename": "b.png", "question": "Who?", "answer": "a man", "capability": ["rec", "ocr"]},
    }
    write_json(tmp_path / "mm-vet" / "mm-vet.json", rows)
    for name in ("a", "b"):
        write_image(tmp_path / "mm-vet" / "images" / f"{name}.png")
    return tmp_path


def test_without_a_judge_there_is_a_submission_and_no_score(data, tmp_path):
    output = Output(tmp_path / "out", {"checkpoint": "x", "folder": "y"})
    result = run_task(Rule(lambda w: f"said {w[8:9]}"), mmvet.TASK, data, output, progress=False)
    assert result.scores == {"questions": 3}
    assert json.loads(result.files[0].read_text()) == {"v1_0": "said x", "v1_1": "said W", "v1_2": "said W"}
    assert result.predictions[0].question.prompt == "x?"  # nothing is added


def test_grades_become_totals_by_ability(data, endpoint):
    grades = {"x?": "0.5", "What is it?": "1.0", "Who?": "0.0"}
    server = endpoint(lambda body: grades[body["messages"][0]["content"].splitlines()[-1].split(" | ")[0]])
    result = run_task(Rule(lambda _: "a | dog"), mmvet.TASK, data, judge=server.judge(), progress=False)
    assert result.scores["total"] == pytest.approx(50.0)
    assert result.scores["by_capability"] == {"math": 50.0, "ocr": 25.0, "rec": 50.0}
    assert result.scores["by_integration"] == {"math_ocr": 50.0, "ocr_rec": 0.0, "rec": 100.0}
    lines = {r["messages"][0]["content"].splitlines()[-1] for r in server.requests}
    assert "x? | -1 <AND> -5 | a | dog | " in lines
    assert server.requests[0]["model"] == "grader" and set(server.keys) == {f"Bearer {KEY}"}


def test_a_reply_without_a_number_is_asked_again_then_counts_nothing(data, endpoint):
    server = endpoint("a good answer")
    question = mmvet.read(data)[0]
    assert mmvet.judged(question, "x", server.judge()) == ("no number", 0.0)
    assert [r["temperature"] for r in server.requests] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert server.requests[1]["messages"][0]["content"].endswith("(digit): ")


@pytest.mark.parametrize("said, score", [("0.7", 0.7), ("1.0 because", 1.0), (" 0.3", None), ("1.5", None)])
def test_grades_are_read_as_the_official_evaluator_does(data, endpoint, said, score):
    server = endpoint(said, "0.1")
    assert mmvet.judged(mmvet.read(data)[0], "x", server.judge())[1] == (0.1 if score is None else score)


def test_verdicts_are_kept_and_not_paid_for_twice(data, endpoint, tmp_path):
    server = endpoint("1.0")
    output = Output(tmp_path / "out", {"checkpoint": "x", "folder": "y"})
    for _ in range(2):
        result = run_task(Rule(lambda _: "dog"), mmvet.TASK, data, output, judge=server.judge(), progress=False)
        assert result.scores["total"] == 100.0
    assert len(server.requests) == 3


def test_the_judge_is_asked_again_after_a_passing_fault(endpoint):
    server = endpoint(503, 429, "fine")
    assert server.judge().ask("?", 3) == "fine" and len(server.requests) == 3


@pytest.mark.parametrize(
    "replies, asked, says",
    [((500,), 3, "status 500"), ((401,), 1, "status 401"), (("<html>",), 3, "not in the form of chat completions")],
)
def test_a_judge_that_does_not_answer_ends_in_one_sentence_without_the_key(endpoint, caplog, replies, asked, says):
    server = endpoint(*replies)
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError, match=says) as error:
        server.judge().ask("?", 3)
    assert len(server.requests) == asked
    assert KEY not in str(error.value) + caplog.text + repr(server.judge()) and "\n" not in str(error.value)


def test_nobody_is_there():
    with pytest.raises(UserError, match="does not answer"):
        Judge("http://127.0.0.1:9", "m", pause=0.0, attempts=2).ask("?", 1)


def test_configuration_comes_from_the_environment():
    assert judge.from_environment({}) is None
    assert judge.from_environment({"JUDGE_API_KEY": KEY, "JUDGE_BASE_URL": "http://x/v1"}) is None
    found = judge.from_environment({"JUDGE_MODEL": "m", "JUDGE_BASE_URL": "https://x/v1", "JUDGE_API_KEY": KEY})
    assert (found.model, found.base_url, found.key) == ("m", "https://x/v1", KEY)
    with pytest.raises(UserError, match="JUDGE_BASE_URL"):
        judge.from_environment({"JUDGE_MODEL": "m", "JUDGE_API_KEY": KEY})


def talk_in_turn(*talks):
    """Each connection hears the next of them, and the last from then on."""
    left = list(talks)
    return lambda connection, head: (left.pop(0) if len(left) > 1 else left[0])(connection, head)


def chat(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"no HTTP at all\r\n\r\n",
        answer(b"\xff\xfe\x00{"),
        answer(b"[" * 100_000),
        answer(b'{"choices": [{"message": {"content": ' + b"[" * 5000 + b"]" * 5000 + b"}}]}"),
        answer(chat(5)),
        answer(chat(["x"])),
        answer(b'{"choices": {"0": 1}}'),
        answer(b'{"choices": []}'),
        answer(b"9" * 5000),
        answer(chat("fine"), "200 OK", "Content-Encoding: gzip"),
        answer(b"x" * 9_000_000),
        answer(b"", "503 X", "Retry-After: nan"),
        answer(b"", "503 X", "Retry-After: -1e999"),
        answer(b"", "429 X", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT"),
    ],
)
def test_the_judge_is_asked_again_after_a_cut_or_malformed_reply(said):
    with serving(talk_in_turn(says(said), says(said), says(answer(chat("fine"))))) as (port, heads):
        found = Judge(f"http://127.0.0.1:{port}/v1", "grader", KEY, pause=0.01, attempts=3).ask("?", 3)
    assert found == "fine" and len(heads) == 3


def test_the_judge_follows_no_redirect_and_shows_the_key_to_nobody_else():
    with serving(says(answer(chat("fine")))) as (other, seen):
        location = f"Location: http://127.0.0.1:{other}/v1/chat/completions"
        for status in ("301 X", "302 X", "303 X", "307 X", "308 X"):
            with serving(says(answer(b"", status, location))) as (port, heads):
                with pytest.raises(UserError, match=f"status {status[:3]}, a redirect, which is not followed"):
                    Judge(f"http://127.0.0.1:{port}/v1", "grader", KEY, pause=0.01).ask("?", 3)
                assert len(heads) == 1
        assert not seen


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"])
def test_the_timeout_holds_for_the_whole_request(said):
    with serving(says(said, *[b"x"] * 300, every=0.05)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"no whole answer within 0\.4 s"):
            Judge(f"http://127.0.0.1:{port}/v1", "grader", KEY, pause=0.01, attempts=2, timeout=0.4).ask("?", 3)
        assert 0.7 < time.monotonic() - begun < 1.5


def test_verdicts_survive_the_failure_of_one_and_damaged_lines(data, endpoint, tmp_path):
    output = Output(tmp_path / "out", {"checkpoint": "x", "folder": "y"})
    failing = endpoint(lambda body: "<html>" if "Who?" in body["messages"][0]["content"].splitlines()[-1] else "1.0")
    with pytest.raises(UserError, match="not in the form"):
        run_task(Rule(lambda _: "dog"), mmvet.TASK, data, output, judge=failing.judge(), progress=False)
    kept = tmp_path / "out" / "mmvet" / "verdicts.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    kept.write_bytes(kept.read_bytes() + b'\xff{\n{"of": 1}\n' + b"[" * 100_000 + b"\n")
    server = endpoint("1.0")
    result = run_task(Rule(lambda _: "dog"), mmvet.TASK, data, output, judge=server.judge(), progress=False)
    assert result.scores["total"] == 100.0 and len(server.requests) == 1


@pytest.mark.parametrize(
    "url", ["http://[", "http://h:abc/v1", "http://h:0/v1", "http:///v1", "http://a:b@h/v1", "http://h /"]
)
def test_an_address_of_the_judge_that_cannot_be_used_is_refused_at_once(url):
    with pytest.raises(UserError, match="JUDGE_BASE_URL"):
        judge.from_environment({"JUDGE_MODEL": "m", "JUDGE_BASE_URL": url})
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        judge.from_environment({"JUDGE_MODEL": "m", "JUDGE_BASE_URL": "http://h/v1", "JUDGE_API_KEY": "sk-1\n"})
