"""Writes report.html: a single file without scripts that loads nothing from elsewhere.

It shows counts by stage and reason, histograms of the scores, calls, tokens and cost by model, and samples of every
kind with their questions and answers. All texts of models and captions are escaped.
"""

import base64
import html
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.images import open_file, write_once
from fusion_jax.synth.journal import Journal
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.stages import STAGES

PER_KIND = 4
_THUMBNAIL = 240
# Scores by their names in a sample, and their titles with a scorer and without one.
_SCORES = {
    "image": ("Image score: CLIPScore + 0.5 SSIM_a", "Image score: 0.5 SSIM_a (no scorer, so no CLIPScore)"),
    "clip": ("CLIPScore of image and description",) * 2,
    "ssim_a": ("SSIM_a",) * 2,
    "statement": ("Mean CLIPScore of the statements",) * 2,
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; } td, th { padding: 3px 12px; text-align: left; }
tr { border-bottom: 1px solid #ddd; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }
.card img { max-width: 100%; } .q { font-weight: 600; white-space: pre-line; } .a { white-space: pre-line; }
.small { color: #666; font-size: 12px; } .charts { display: flex; flex-wrap: wrap; gap: 24px; }
"""


def costs(config: SynthConfig, journal: Journal) -> dict[str, dict[str, float]]:
    """Replies, tokens and money by purpose and model, summed over the whole journal."""
    books: dict[str, dict[str, float]] = {}
    for entry in journal.values():
        line = books.setdefault(f"{entry.get('purpose')} {entry.get('model')}", Counter())
        line["replies"] += 1
        line["refused"] += "refused" in entry
        if "image" in entry:
            line["cost"] += config.images.price_image
        tokens = entry.get("tokens", (0, 0))
        whole = len(tokens) == 2 and all(isinstance(count, int) for count in tokens)
        prompt, completion = tokens if whole else (0, 0)
        model = config.vision if entry.get("purpose") == "verify" else config.llm
        line["prompt_tokens"] += prompt
        line["completion_tokens"] += completion
        line["cost"] += (prompt * model.price_prompt + completion * model.price_completion) / 1e6
    return {name: dict(line) for name, line in sorted(books.items())}


def write_report(out: Path, counts: dict[str, Any], books: dict[str, dict[str, float]]) -> Path:
    """Writes OUT/report.html and returns its path.

    Args:
      counts: as in the manifest: captions, records, kinds, dropped, and understood for the embedded backend.
      books: as returned by `costs`.
    """
    scores: dict[str, list[float]] = {name: [] for name in _SCORES}
    examples: dict[str, list[dict]] = {name: [] for name in KINDS}
    with open(out / "lineage.jsonl", encoding="utf-8") as f:
        for record in map(json.loads, f):
            for name, values in scores.items():
                if record["scores"].get(name) is not None:
                    values.append(record["scores"][name])
            if len(examples[record["kind"]]) < PER_KIND:
                examples[record["kind"]].append(record)
    parts = [
        "<h1>Synthesis</h1>",
        f"<p>{counts['captions']} captions became {sum(counts['records'].values())} records.</p>",
        "<h2>Records</h2>",
        _table(("file", "records"), counts["records"].items()),
        _table(("kind", "records"), counts["kinds"].items()),
        "<h2>What became of all captions</h2>",
        _flow(counts),
        *_understood(counts),
        "<h2>Scores</h2>",
        '<div class="charts">',
        *(_histogram(_SCORES[name][not scores["clip"]], values) for name, values in scores.items() if values),
        "</div>",
        "<h2>Cost</h2>",
        _books(books),
        "<h2>Samples</h2>",
    ]
    for kind, records in examples.items():
        if records:
            parts += [f"<h3>{_text(kind)}</h3>", '<div class="grid">', *(_card(out, one) for one in records), "</div>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Synthesis</title><style>{_STYLE}</style>'
    path = out / "report.html"
    write_once(path, (page + "\n".join(parts) + "</html>\n").encode(errors="replace"))
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(head: tuple[str, ...], rows) -> str:
    def cell(value):
        number = isinstance(value, int | float)
        text = (
            f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}" if number else value
        )
        return f"<td{' class=n' if number else ''}>{_text(text)}</td>"

    lines = ["<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _flow(counts: dict[str, Any]) -> str:
    """Captions that enter each stage, and those dropped there by reason."""
    by_stage: dict[str, dict[str, int]] = {}
    for name, lost in counts["dropped"].items():
        stage, reason = name.split(": ", 1)
        by_stage.setdefault(stage, {})[reason] = lost
    rows, left = [], counts["captions"]
    for stage in ("pool", *STAGES, "select"):
        reasons = by_stage.get(stage, {})
        summary = ", ".join(f"{reason} {lost:,}" for reason, lost in sorted(reasons.items(), key=lambda one: -one[1]))
        rows.append((stage, left, sum(reasons.values()), summary))
        left -= sum(reasons.values())
    rows.append(("records", left, 0, ""))
    return _table(("stage", "in", "lost", "reasons"), rows)


def _understood(counts: dict[str, Any]) -> list[str]:
    """What the embedded backend kept of the captions; empty where another backend described them."""
    readings = counts.get("understood")
    if not readings:
        return []
    rows = [
        ("captions that name something it can draw", readings["captions"]),
        ("captions that name nothing it can draw", readings["nothing_known"]),
        ("share of their content words that the scenes keep, mean", readings["kept_share"]),
        ("dropped because too little was kept", readings["too_little"]),
        ("others with things that the caption does not name", readings["with_inventions"]),
        ("such things in all", readings["inventions"]),
    ]
    missed = ", ".join(f"{word} {count}" for word, count in readings["missed"].items()) or "none"
    return [
        "<h2>What the embedded backend understood</h2>",
        _table(("", ""), rows),
        f"<p>Words that it cannot draw, the most frequent ones: {_text(missed)}</p>",
    ]


def _books(books: dict[str, dict[str, float]]) -> str:
    if not books:
        return "<p>No model was paid for.</p>"
    keys = ("replies", "refused", "prompt_tokens", "completion_tokens", "cost")
    rows = [(name, *(line.get(key, 0) for key in keys)) for name, line in books.items()]
    total = [sum(line.get(key, 0) for line in books.values()) for key in keys]
    return _table(("purpose and model", *keys), [*rows, ("total", *total)])


def _histogram(title: str, values: list[float], bins: int = 30) -> str:
    """Writes an SVG without a plotting library or a script."""
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    heights = [0] * bins
    for value in values:
        heights[min(int((value - low) / width), bins - 1)] += 1
    top = max(heights)
    bars = "".join(
        f'<rect x="{10 + 10 * i}" y="{110 - 100 * n / top:.1f}" width="9" height="{100 * n / top:.1f}" fill="#4a7ebb"/>'
        for i, n in enumerate(heights)
    )
    mean = sum(values) / len(values)
    return (
        f'<figure><svg width="320" height="132" role="img" aria-label="{_text(title)}">{bars}'
        f'<text x="10" y="126" font-size="11">{low:.3f}</text>'
        f'<text x="310" y="126" font-size="11" text-anchor="end">{high:.3f}</text></svg>'
        f"<figcaption>{_text(title)}: mean {mean:.3f} of {len(values):,}</figcaption></figure>"
    )


def _card(out: Path, record: dict[str, Any]) -> str:
    pictures = []
    for image in record["images"]:
        try:
            small = open_file(out / image["file"])
        except OSError:
            pictures.append(f"<p>{_text(image['file'])} cannot be read.</p>")
            continue
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(f'<img alt="" src="data:image/jpeg;base64,{data}">')
    rounds = []
    for pair in record["pairs"]:
        options = "".join(f"\n- {option}" for option in pair.get("options", ()))
        rounds.append(f'<p class="q">{_text(pair["question"] + options)}</p><p class="a">{_text(pair["answer"])}</p>')
    scores = ", ".join(f"{name} {value:.3f}" for name, value in record["scores"].items() if value is not None)
    reading = ""
    if "kept_share" in record:
        lists = ((name, ", ".join(record[name]) or "nothing") for name in ("understood", "missed", "invented"))
        reading = f"{record['kept_share']:.0%} of the caption kept; " + "; ".join(f"{n}: {w}" for n, w in lists)
    return (
        f'<div class="card">{"".join(pictures)}{"".join(rounds)}'
        f'<p class="small">Caption: {_text(record["caption"])}<br>'
        f"{_text(reading)}<br>{_text(scores)}<br>"
        f"{_text(record['id'])}, {_text(record['source'])}, {_text(record['licence'])}</p></div>"
    )
