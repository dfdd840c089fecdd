"""TSVs with images: base64 or another row's index, in every task that reads one; damage ends in a sentence first."""

import base64

import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals.prepare import prepare
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import record, run_task
from fusion_jax.evals.tables import read_images, read_table

RED, BLUE = (base64.b64encode(image_bytes(colour)).decode() for colour in ("red", "blue"))
COLUMNS = {
    "mmbench_en_dev": ("MMBench_DEV_EN.tsv", ("index", "question", "A", "B", "answer", "image")),
    "ai2d": ("AI2D_TEST.tsv", ("index", "question", "A", "B", "answer", "image")),
    "realworldqa": ("RealWorldQA.tsv", ("index", "question", "A", "B", "answer", "image")),
    "mmstar": ("MMStar.tsv", ("index", "question", "A", "B", "answer", "category", "l2_category", "image")),
    "mme_realworld": (
        "MME-RealWorld.tsv", ("index", "question", "A", "B", "answer", "category", "l2-category", "image")
    ),
}  # fmt: skip


def row(index, image, **changes):
    common = {"question": f"What is {index}?", "A": "x", "B": "y", "answer": "A"}
    common |= {"category": "Perception/c", "l2-category": "d", "l2_category": "d"}
    return {"index": index, "image": image, **common, **changes}


def write(folder, task, rows):
    name, columns = COLUMNS[task]
    lines = ["\t".join(columns), *("\t".join(str(r[c]) for c in columns) for r in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("task", COLUMNS)
def test_an_image_may_be_another_rows_index(tmp_path, task):
    write(tmp_path, task, [row(3, "7"), row(7, BLUE), row(8, RED), row(9, " 7 ")])
    questions = prepare(TASKS[task], tmp_path).questions
    images = {q.text or q.prompt: record(TASKS[task], q).images[0] for q in questions}
    colours = [next(image for text, image in images.items() if f"What is {n}?" in text) for n in (3, 7, 8, 9)]
    blue, red = image_bytes("blue"), image_bytes("red")
    assert colours == [blue, blue, red, blue]


@pytest.mark.parametrize("task", COLUMNS)
@pytest.mark.parametrize(
    "rows, message",
    [
        ([row(1, RED), row(2, "3")], "row 1, index 2: its image is the index 3, and no row has that"),
        ([row(1, RED), row(2, "2")], "row 1, index 2: its image is the index 2, which is its own"),
        ([row(1, RED), row(2, "1"), row(3, "2")], "row 2, index 3: .* index 2, and that row's image is the index 1"),
        ([row(1, RED), row(2, "1.0")], "row 1, index 2: its image is the index 1.0, and no row has that"),
        ([row(1, RED), row(2, "")], "row 1, index 2: the image is empty"),
        ([row(1, RED), row(2, "no image!")], "row 1, index 2: the image is not valid base64"),
        ([row(1, RED), row(2, RED[:-2])], "row 1, index 2: the image is not valid base64"),
        ([row(1, RED), row(2, base64.b64encode(b"hello" * 9).decode())], "no image of a known format.*row 1, index 2"),
        ([row(1, RED), row("2.0", RED)], "row 1: the index '2.0' is not a whole number"),
        ([row(1, RED), row("", RED)], "row 1: the index '' is not a whole number"),
        ([row(1, RED), row(5, RED), row(1, BLUE)], "the rows 0 and 2 have the same index 1"),
        ([row(1, RED), row(2, RED, question='"Which')], "row 1 cannot be read: .*begins with a quotation mark"),
        ([row(1, RED), row(2, RED, question='"Which" one')], "row 1 cannot be read: .*begins with a quotation mark"),
        (
            [row(1, RED, question='"Which'), row(2, RED), row(3, RED, question='one"')],
            "row 0: a quotation mark opens a cell and closes it in another row",
        ),
        ([row(1, RED), row(2, f"{RED}\tx")], "row 1 has more cells"),
        ([row(1, RED), row(2, RED, question=" ")], "row 1: question is empty"),
    ],
)
def test_damage_is_said_before_anything_is_asked(tmp_path, task, rows, message):
    write(tmp_path, task, rows)
    answerer = Rule(str)
    with pytest.raises(UserError, match=message) as error:
        run_task(answerer, TASKS[task], tmp_path, progress=False)
    assert COLUMNS[task][0] in str(error.value) and "\n" not in str(error.value) and not answerer.asked


@pytest.mark.parametrize("task", ["mmbench_en_dev", "ai2d", "mme_realworld"])
@pytest.mark.parametrize("answer", ["a", "C", "AB", "1"])
def test_an_answer_that_is_no_options_letter(tmp_path, task, answer):
    write(tmp_path, task, [row(1, RED), row(2, RED, answer=answer)])
    with pytest.raises(
        UserError, match=f"{COLUMNS[task][0]}, .*index 2.*the answer '{answer}' is not one of its 2 options"
    ):
        run_task(Rule(str), TASKS[task], tmp_path, progress=False)


def test_a_small_letter_in_a_parquet_file_names_its_row(tmp_path):
    common = {"question": "?", "question_type": "multiple-choice", "options": "['x', 'y']", "image_1": cell()}
    rows = [{"id": f"validation_Art_{n}", "answer": answer, **common} for n, answer in enumerate("Ab")]
    rows = [r | {"question": "<image 1>?"} for r in rows]
    write_parquet(tmp_path / "validation-0.parquet", rows)
    with pytest.raises(UserError, match=r"the answer 'b' is not one of its 2 options .*validation-0\.parquet, row 1"):
        run_task(Rule(str), TASKS["mmmu"], tmp_path, progress=False)


def test_base64_in_lines_and_columns_in_any_order(tmp_path):
    cut = "\n".join(RED[i : i + 76] for i in range(0, len(RED), 76))
    text = f'image\tindex\tquestion\n"{cut}"\t1\t"Two\nlines, and ""marks"""\n1\t2\tB?\n'
    (tmp_path / "a.tsv").write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + text, encoding="utf-8")
    first, second = read_images(tmp_path / "a.tsv", ["question"])
    assert first.values == {"index": "1", "question": 'Two\nlines, and "marks"'}
    assert first.picture.load() == second.picture.load() == image_bytes("red")


def test_an_image_may_be_a_data_url(tmp_path):
    write(tmp_path, "ai2d", [row(1, f"data:image/png;base64,{BLUE}"), row(2, f" Data:image/png;base64, {RED} ")])
    first, second = (q.pictures[0].load() for q in prepare(TASKS["ai2d"], tmp_path).questions)
    assert first == image_bytes("blue") and second == image_bytes("red")
    write(tmp_path, "ai2d", [row(1, f"{BLUE},{RED}")])
    with pytest.raises(UserError, match="row 0, index 1: the image is not valid base64"):
        prepare(TASKS["ai2d"], tmp_path)


def test_images_of_a_table_are_not_kept(tmp_path):
    """Rows hold words alone: a table may be larger than memory."""
    big = base64.b64encode(image_bytes("red") + bytes(1 << 20)).decode()
    write(tmp_path, "mmstar", [row(n, big) for n in range(3)])
    rows = read_images(tmp_path / "MMStar.tsv", ["question"])
    assert all(sum(map(len, r.values.values())) < 100 and "image" not in r.values for r in rows)
    assert len(rows[2].picture.load()) > 1 << 20


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(UserError, match="has two columns 'x'"):
        read_table(tmp_path / "a.csv", ["x"])


def test_an_image_behind_a_good_header_is_looked_at_when_it_is_asked(tmp_path):
    """Headers are checked for all, and a file that is none names the question and how many more there are."""
    rows = [
        {"question": "?", "answer": "yes", "category": "random", "image": {"bytes": data, "path": "a.png"}}
        for data in (image_bytes(), b"x" * 99, b"", image_bytes())
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    with pytest.raises(UserError, match=r"pope, question random/1: .*row 1, image.*1 more of 4 images cannot be used"):
        run_task(Rule(str), TASKS["pope"], tmp_path, progress=False)
    assert len(prepare(TASKS["pope"], tmp_path, limit=1).questions) == 1
