"""FLOPs against the matrix products of the traced program, peak rates, and what is written about a run."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import example, lay, mixed_batch, params, tiny
from PIL import Image

from fusion_jax.devices import flops
from fusion_jax.models import cpu_kernels
from fusion_jax.models.config import VARIANTS
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import metrics
from fusion_jax.training.jsonl import read_rows, truncate_rows
from fusion_jax.training.plots import plot_losses
from fusion_jax.training.writer import Writer

# FLOPs.


def products(jaxpr) -> int:
    """FLOPs of all matrix products of a traced program, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        repeat = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        assert equation.primitive.name not in ("while", "cond"), "how often does it run?"
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeat * products(inner)
    return total


def traced(config, batch):
    """Matrix products of the forward pass, logits at every position."""
    model = Fusion(config)

    def run(p, batch):
        hidden, visual, _ = model.apply({"params": p}, batch)
        return model.apply({"params": p}, hidden, method="logits"), visual and vars(visual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "available", lambda: False)  # products in C are not in the trace
        return products(jax.make_jaxpr(run)(params(config), batch).jaxpr)


def full_rows(config, **arguments):
    """Rows of equal length, questions of full length, no padding: what is traced is what is needed."""
    examples = [example(config, seed, **arguments) for seed in (0, 3)]
    return lay(config, examples, rounds=arguments.get("rounds", 1))


def everywhere(config, batch):
    """The batch's shape, with a target at every position, as in `traced`."""
    shape = flops.shape_of(batch)
    assert all(length == batch.tokens.shape[1] for length in shape.lengths)
    return dataclasses.replace(shape, supervised=batch.tokens.size)


def unneeded(config, shape, batch):
    """Traced, but not counted: the half of causal attention above the diagonal, the attention of the exchange to the
    other crops of the group, and logits of the vocabulary's padding."""
    m = config.llm
    halves = sum(m.layers * 2 * length * length * m.heads * m.per_head for length in shape.lengths)
    others = max(batch.crop_kind.shape[1] - 1, 0) * shape.windows * 2 * m.width
    padding = 2 * shape.supervised * m.width * (m.padded_vocab - m.vocab_size)
    return halves + config.exchange_layers * 2 * others + padding


@pytest.mark.parametrize(
    ("preset", "changes", "arguments"),
    [
        ("paper", {}, {}),
        ("paper", {}, {"rounds": 2}),
        ("paper", {"text_guided": False}, {}),
        ("paper", {"mask": "none"}, {}),
        ("paper", {"mapping_loss_weight": 0.0}, {}),
        ("paper", {"semantic_exchange": False}, {}),
        ("paper", {"llm.head_dim": 6, "llm.vocab_size": 50, "llm.layers": 3}, {}),
        ("released", {}, {"rounds": 2}),
        ("released", {"latent_counts": (1,), "vision.layers": 5}, {}),
        ("paper", {"vision.layers": 5}, {}),  # two of them are after the last tap
    ],
)
def test_forward_flops_are_the_matrix_products_of_the_program(preset, changes, arguments):
    # With latents on a divisor of the 3 x 3 grid windows do not overlap.
    config = tiny(preset, **{"latent_counts": (9,) if preset == "paper" else (4,), **changes})
    batch = full_rows(config, **arguments)
    shape = everywhere(config, batch)
    assert flops.forward_flops(config, shape) + unneeded(config, shape, batch) == traced(config, batch)
    assert flops.step_flops(config, shape) == 3 * flops.forward_flops(config, shape)


def test_text_rows_cost_no_encoder():
    config = tiny()
    batch = lay(config, [example(config, s, image=False) for s in range(2)])
    shape = everywhere(config, batch)
    assert (shape.crops, shape.plain, shape.rounds) == ((), 0, 0)
    none = {n: getattr(batch, n)[:, :0] for n in ("crops", "crop_kind", "quadrants", "crop_text", "crop_text_mask")}
    bare = dataclasses.replace(batch, **none)
    assert flops.forward_flops(config, shape) + unneeded(config, shape, bare) == traced(config, bare)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_shape_of_a_batch_leaves_padding_out(preset):
    batch = mixed_batch(tiny(preset))
    shape = flops.shape_of(batch)
    assert shape.lengths == tuple((batch.segment_ids > 0).sum(-1).tolist())
    assert shape.supervised == 14 and shape.latent_count == 4
    if preset == "paper":
        assert (shape.crops, shape.plain, shape.rounds) == ((6, 5, 6), 0, 4)
    else:  # the text-only row has a zero image, which is encoded without a question
        assert (shape.crops, shape.plain, shape.rounds) == ((6, 5, 0, 6), 16, 5)


def test_packed_examples_count_apart():
    config = tiny()
    batch = lay(config, [example(config, 0)], length=34)
    segments = batch.segment_ids.copy()
    length = int((segments > 0).sum())
    segments[0, 10:length] = 2
    assert flops.shape_of(dataclasses.replace(batch, segment_ids=segments)).lengths == (10, length - 10)


def test_published_sizes_cost_what_their_parameters_say():
    # Two FLOPs for each weight of the decoder and token, attention aside.
    config = VARIANTS["fusion_x"]["3b"]
    shape = flops.BatchShape((100,), (), 0, 0, 0, 4, 0)
    weights = 32 * (4 * 3072 * 3072 + 3 * 3072 * 8192)
    attention = 32 * 2 * 100 * 100 * 3072
    assert flops.forward_flops(config, shape) == 2 * 100 * weights + attention


# What is written about a run.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42.4, "42s"), (59.6, "1m00s"), (190, "3m10s"), (3599, "59m59s"), (3720, "1h02m"), (90000, "25h00m")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


REPORT = {
    "total": 2.34567, "ce": 2.25, "v2t": 0.5, "t2v": 0.45, "grad_norm": 1.5, "learning_rate/default": 1e-4,
    "learning_rate/^llm/": 2e-5, "skipped": 0, "samples_per_second": 12.34, "text_tokens_per_second": 3456.7,
    "visual_tokens_per_second": 789.2, "mfu": 0.42, "input_wait_share": 0.07, "checkpoint_share": 0.01,
    "seconds_per_step": 0.5,
}  # fmt: skip


def test_line_names_what_a_person_looks_for():
    line = metrics.line("stage1", 20, 100, REPORT, 190)
    for part in (
        "stage1 20/100", "total 2.3457", "ce 2.2500", "v2t 0.500", "t2v 0.450", "lr 1.0e-04/2.0e-05", "grad 1.50",
        "12.3 samples/s", "3457 text tok/s", "789 visual tok/s", "mfu 42%", "input 7%", "save 1%", "left 3m10s",
    ):  # fmt: skip
        assert part in line
    assert "skipped" not in line and "\n" not in line
    assert "skipped 3" in metrics.line("stage1", 20, 100, {**REPORT, "skipped": 3.0}, 190)


def test_interval_reports_means_rates_and_mfu(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(metrics.time, "perf_counter", functools.partial(next, clock))
    interval = metrics.Interval()
    for k in (1, 3):
        step = {name: jnp.float32(k) for name in ("total", "ce", "v2t", "t2v", "grad_norm", "update_norm")}
        tokens = {"text_tokens": jnp.float32(10 * k), "visual_tokens": jnp.float32(100 * k)}
        rest = {"skipped": jnp.float32(k), "learning_rate/default": jnp.float32(k / 10), "supervised_tokens": 1.0}
        interval.add({**step, **tokens, **rest}, samples=8, flops=3e9)
        interval.spend("input", 0.5)
    report = interval.report(peak=10e9)
    assert {report[name] for name in ("total", "ce", "v2t", "t2v", "grad_norm", "update_norm")} == {2.0}
    assert report["skipped"] == 3 and report["learning_rate/default"] == pytest.approx(0.3)
    assert report["samples_per_second"] == 4 and report["seconds_per_step"] == 2
    assert report["text_tokens_per_second"] == 10 and report["visual_tokens_per_second"] == 100
    assert report["mfu"] == pytest.approx(6e9 / 4 / 10e9) and report["input_wait_share"] == 0.25
    assert metrics.line("s", 2, 2, report, 0)


def write_lines(path, steps):
    path.write_text("".join(json.dumps({"step": s, "ce": 1.0 / s}) + "\n" for s in steps))


def test_truncate_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 6))
    with path.open("a") as file:
        file.write('{"note": 1}\n{"step": 2, "ce"')
    truncate_rows(path, 3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert path.read_text().endswith("\n") and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    truncate_rows(path, 0)
    assert path.read_text() == ""
    truncate_rows(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_writer_that_starts_again_drops_what_came_after_its_checkpoint(tmp_path):
    folder = tmp_path / "run" / "stage1"
    writer = Writer(folder, 0)
    for step in (1, 2, 3, 4):
        writer.scalars(step, {"ce": float(step), "nothing": None})
    writer.text(4, "answers", "two")
    writer.close()
    writer = Writer(folder, 2)
    writer.scalars(3, {"ce": 30.0})
    # Flushed line by line: a killed run loses none.
    assert read_rows(folder / "metrics.jsonl") == [
        {"step": 1, "ce": 1.0}, {"step": 2, "ce": 2.0}, {"step": 3, "ce": 30.0},
    ]  # fmt: skip
    writer.close()
    assert sum(path.stat().st_size for path in (folder / "tensorboard").iterdir()) > 100


def test_plot_is_a_png_with_curves(tmp_path):
    files = {}
    for name, falling in (("stage1", True), ("stage2", False)):
        files[name] = tmp_path / f"{name}.jsonl"
        with files[name].open("w") as file:
            for step in range(1, 30):
                row = {"step": step, "ce": 5 / step if falling else 1.0, "v2t": 0.0, "t2v": 0.5}
                file.write(json.dumps(row) + "\n")
                if step % 10 == 0:
                    file.write(json.dumps({"step": step, "validation/ce": 2.0}) + "\n")
    plot_losses(files, tmp_path / "losses.png")
    image = Image.open(tmp_path / "losses.png")
    assert image.format == "PNG" and image.width > 1.5 * image.height > 300
    pixels = np.asarray(image.convert("RGB")).astype(int)
    colours = pixels.max(-1) - pixels.min(-1) > 60  # curves; axes and text are grey
    half = pixels.shape[1] // 2
    assert colours[:, :half].sum() > 200 and colours[:, half:].sum() > 200
    # A falling curve covers more rows than a constant one.
    assert colours[:, :half].any(1).sum() > 1.5 * colours[:, half:].any(1).sum()
