"""Draws histograms as SVG, for the page."""

import math

import numpy as np

from fusion_jax.inspection.figures import lengths
from fusion_jax.inspection.markup import escape
from fusion_jax.inspection.sample import Sample, StageData


def stage_charts(data: StageData, sample: Sample) -> str:
    """Draws histograms over the sample."""
    sample = sample.records[: sample.count]
    good = sample[sample["good"] > 0]
    if not len(good):
        return '<p class="note">None of the measured records can be used.</p>'
    of = lengths(data, sample)
    charts = [
        histogram(of["length"], "positions of a conversation, visual ones included", limit=data.stage.max_length),
        histogram(of["text"], "text tokens"),
        histogram(of["visual"], "visual tokens"),
        histogram(good["supervised"], "supervised tokens"),
        histogram(good["question"][good["images"] > 0], "question tokens that guide the encoder"),
        histogram(good["answers"], "rounds"),
    ]
    return f'<h3>over the sample</h3><div class="charts">{"".join(charts)}</div>'


def histogram(values: np.ndarray, title: str, limit: int | None = None, most: int = 30) -> str:
    """Draws how often values occur, as SVG: one bar per value if they are few, else bins of equal width from 0."""
    if not len(values):
        return ""
    top = int(max(values.max(), 1))
    step = math.ceil((top + 1) / most)
    counts = np.bincount(values // step, minlength=top // step + 1)
    width, height, left, base = 320, 130, 4, 108
    bar = min((width - 2 * left) / len(counts), 26)
    drawn = []
    for i, count in enumerate(counts.tolist()):
        tall = 84 * count / counts.max()
        span = f"{i * step:,}" if step == 1 else f"{i * step:,}–{(i + 1) * step - 1:,}"
        drawn.append(
            f'<rect x="{left + i * bar:.2f}" y="{base - tall:.2f}" width="{max(bar - 1, 0.5):.2f}" height="{tall:.2f}" '
            f'fill="#4a78b0"><title>{span}: {count:,} of {len(values):,}</title></rect>'
        )
    median = int(np.percentile(values, 50, method="nearest"))
    at = left + (median // step + 0.5) * bar
    drawn.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{base}" stroke="#d5573b" stroke-dasharray="3 2"/>')
    anchor = "start" if at < width / 2 else "end"
    drawn.append(
        f'<text x="{at + (3 if anchor == "start" else -3):.1f}" y="14" font-size="10.5" fill="#d5573b" '
        f'text-anchor="{anchor}">median {median:,}</text>'
    )
    right, where = left + len(counts) * bar, "end" if len(counts) > 8 else "start"
    end = f"{top:,}" + (f" (row: {limit:,})" if limit else "")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
        f'<line x1="{left}" x2="{width - left}" y1="{base}" y2="{base}" stroke="#9aa5b3"/>{"".join(drawn)}'
        f'<text x="{left}" y="{base + 14}" font-size="10.5" fill="#46505e">0</text><text x="{right:.1f}" '
        f'y="{base + 14}" font-size="10.5" fill="#46505e" text-anchor="{where}">{end}</text></svg></figure>'
    )
