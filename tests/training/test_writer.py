"""Metrics on disk: the writer, damaged JSONL files, the plot, and services that fail."""

import os
import resource
import sys

import pytest

from fusion_jax.errors import UserError
from fusion_jax.training.jsonl import read_rows, truncate_rows
from fusion_jax.training.plots import plot_losses
from fusion_jax.training.writer import Writer, import_wandb


def test_full_disk_costs_no_metrics_line_and_no_run(tmp_path, caplog):
    writer = Writer(tmp_path, 0)
    writer.scalars(1, {"ce": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 3, hard))
    try:
        for step in range(2, 40):  # more than TensorBoard's queue holds
            writer.scalars(step, {"ce": float(step), "total": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.scalars(40, {"ce": 40.0})
    writer.close()
    assert "training goes on" in caplog.text
    assert [row["ce"] for row in read_rows(writer.path)] == [float(step) for step in range(1, 41)]


DAMAGED = {
    "torn at the end": b'{"step": 2, "ce"',
    "torn in the middle": b'{"step": 2, "c\n{"step": 3, "ce": 1.0}\n',
    "no UTF-8": b'{"step": 2, "ce": \xff\xfe}\n',
    "zeros": b"\0" * 5000,
    "a number": b"5\n",
    "a list": b"[]\n",
    "a text": b'"x"\n',
    "no step": b'{"ce": 1.0}\n',
    "a step that is no number": b'{"step": "2"}\n',
    "a step that is NaN": b'{"step": NaN}\n',
    "a step with a fraction": b'{"step": 2.5}\n',
    "a step below 0": b'{"step": -2}\n',
    "a huge step": b'{"step": 1' + b"0" * 5000 + b"}\n",
    "deeply nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_records.jsonl"])
def test_damaged_lines_are_cut_off_with_a_warning(tmp_path, caplog, name, damage):
    good = b'{"step": 1, "ce": 1.0}\n'
    path = tmp_path / name
    path.write_bytes(good + DAMAGED[damage])
    writer = Writer(tmp_path, 2)
    truncate_rows(path, 2)
    writer.scalars(3, {"ce": 0.5})
    writer.close()
    assert path.read_bytes().startswith(good)
    assert [row["step"] for row in read_rows(path)] == ([1, 3] if name == "metrics.jsonl" else [1])
    assert caplog.text.count(f"{path}: 1 damaged line(s) cut off (2)") == 1
    plot_losses({"stage": path}, tmp_path / "losses.png")


def test_plot_leaves_out_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = ['"x"', "[1]", "null", "true", "1" + "0" * 400, "1e999", "NaN", "0.5"]
    path.write_text("".join(f'{{"step": {step}, "ce": {value}}}\n' for step, value in enumerate(values)))
    plot_losses({"stage": path}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_records.jsonl"])
def test_log_that_is_no_file_is_said(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} must be a file"):
        truncate_rows(tmp_path / name, 0)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} must be a file"):
        truncate_rows(tmp_path / name, 0)


WANDB = """
class Run:
    def log(self, values, step):
        raise ConnectionError("the network is down")

    def finish(self):
        raise ConnectionError("the network is down")


def init(project, **_):
    if project == "refused":
        raise RuntimeError("no API key\\nsecond line")
    return Run()
"""


def test_failing_wandb_costs_its_rows_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        UserError, match=r"Weights & Biases could not be started .*\(no API key\); .*WANDB_MODE=offline"
    ):
        Writer(tmp_path / "refused", 0, "refused")
    writer = Writer(tmp_path / "stage", 0, "project")
    for step in (1, 2, 3):
        writer.scalars(step, {"ce": 1.0})
        writer.publish()
    writer.close()
    monkeypatch.delitem(sys.modules, "wandb")
    assert [row["step"] for row in read_rows(writer.path)] == [1, 2, 3]
    assert caplog.text.count("Weights & Biases gets nothing: ConnectionError: the network is down") == 1


def test_restarted_writer_knows_what_was_written(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.scalars(4, {"ce": 1.0})
    writer.scalars(4, {"validation/ce": 1.0})
    writer.scalars(5, {"ce": 1.0})
    writer.close()
    again = Writer(tmp_path, 4)
    assert again.has(4, "validation/ce") and not again.has(5, "ce")
    again.close()


def test_missing_wandb_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.wandb_project needs Weights & Biases .*pip install wandb"):
        import_wandb()
