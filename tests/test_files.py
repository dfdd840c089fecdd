"""Files that are written whole, whatever lies under the name that they grow under."""

import os
from pathlib import Path

import pytest

from fusion_jax import files
from fusion_jax.data import shard_folder
from fusion_jax.evals import predictions
from fusion_jax.files import new_file, whole_file, write_whole
from fusion_jax.synth import images
from fusion_jax.synth.folder import locked
from fusion_jax.training.jsonl import truncate_rows
from fusion_jax.training.plots import plot_losses

WRITERS = {
    "whole": (lambda f: write_whole(f / "config.json", "{}"), "config.tmp", "config.json"),
    "rows": (lambda f: predictions.write_rows(f / "rows.jsonl", [{"a": 1}]), "rows.tmp", "rows.jsonl"),
    "log": (lambda f: truncate_rows(f / "metrics.jsonl", 1), "metrics.tmp", "metrics.jsonl"),
    "plot": (lambda f: plot_losses({"s": f / "metrics.jsonl"}, f / "l.png"), "l.tmp", "l.png"),
    "image": (lambda f: images.write_once(f / "a.png", b"x"), f".a.png.{os.getpid()}.tmp", "a.png"),
    "plan": (
        lambda f: shard_folder.write_json(f, f / "partial" / "plan.json", {}),
        f"partial/plan.json.{os.getpid()}.tmp",
        "partial/plan.json",
    ),
}


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "file"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_leftover_is_neither_waited_for_nor_followed(tmp_path, name, kind):
    write, part, target = WRITERS[name]
    folder = tmp_path / "folder"
    (folder / "partial").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "ce": 2.0}\n{"step": 2, "ce": 1.0}\n')
    precious = tmp_path / "precious"
    part = folder / part
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "file":
        part.write_text("x" * 10_000)
    else:
        part.symlink_to(precious)
    if kind == "link":
        precious.write_text("precious")
    write(folder)
    assert (folder / target).is_file() and not os.path.lexists(part)
    assert not (folder / target).is_symlink() and (folder / target).stat().st_size > 0
    assert precious.read_text() == "precious" if kind == "link" else not precious.exists()


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    with pytest.raises(OSError):
        new_file(tmp_path / "a.tmp")
    assert (tmp_path / "a.tmp").is_dir()


def test_what_fails_half_way_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / "lock"
    with files.locked(path) as mine:
        assert mine
        with files.locked(path) as other:
            assert not other
    path.unlink()
    with files.locked(path) as mine:
        path.unlink()  # by a process that had it and ends
        with files.locked(path) as other:
            assert mine and other


def test_the_lock_of_a_synthesis_is_not_waited_for_nor_emptied(tmp_path):
    precious = Path(tmp_path, "precious")
    precious.write_text("precious")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "lock").symlink_to(precious)
    with pytest.raises(Exception, match="Cannot write"), locked(tmp_path / "link"):
        pass
    assert precious.read_text() == "precious"
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "lock")
    with locked(tmp_path / "pipe"):
        pass
