"""Small benchmark folders in the published formats, with real image files, and a model that answers by rule."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


def image_bytes(colour: str = "red", size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def write_image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(colour, kind="JPEG" if path.suffix == ".jpg" else "PNG"))


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Sequence[dict], rows_per_group: int = 2) -> None:
    """As `datasets` writes them: an image is a struct of bytes and path, and a file has several row groups."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=rows_per_group)


def cell(colour: str = "red") -> dict:
    return {"bytes": image_bytes(colour), "path": f"{colour}.png"}


def pope_folder(folder: Path, answers: dict[str, Sequence[str]]) -> Path:
    """The three annotation files, with these labels, and the images they name."""
    for split, labels in answers.items():
        rows = [
            {"question_id": n + 1, "image": f"{split}_{n}.jpg", "text": f"Is there a {split} {n} dog?", "label": label}
            for n, label in enumerate(labels)
        ]
        write_lines(folder / f"coco_pope_{split}.json", rows)
        for n in range(len(labels)):
            write_image(folder / "val2014" / f"{split}_{n}.jpg", COLOURS[n % len(COLOURS)])
    return folder


def held_out_folder(folder: Path, answers: Sequence[str], topics: Sequence[str]) -> None:
    """held_out.json with one question on each answer, and images that are named by the answers."""
    records = []
    for i, (answer, topic) in enumerate(zip(answers, topics)):
        write_image(folder / f"{answer}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        extra = {"topics": [topic]} if topic else {}
        records.append({"id": str(i), "image": f"{answer}.png", "conversations": turns, **extra})
    (folder / "held_out.json").write_text(json.dumps(records))


class Rule:
    """Answers each prompt as a function says, and keeps what it was asked."""

    def __init__(self, rule: Callable[[str], str], rows: int = 4):
        self.rule, self.rows, self.max_tokens = rule, rows, 7
        self.asked: list[str] = []
        self.lengths: set[int] = set()
        self.batches: list[int] = []

    def answer(self, prompts):
        self.batches.append(len(prompts))
        self.lengths.add(self.max_tokens)
        words = [prompt.turns[-1]["value"] for prompt in prompts]
        self.asked += words
        return [self.rule(w) for w in words]
