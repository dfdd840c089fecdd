"""The page of `data.inspect`: one HTML file with everything in it, no script and nothing fetched.

Conversations, names and reasons come from data files: they are text here, never markup, and a content security policy
says so once more.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fusion_jax.batch import ZERO_IMAGE, Batch
from fusion_jax.data.layout import Example, LayoutSpec, measure
from fusion_jax.data.tiles import WHOLE, Tiling
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.inspection.numbers import Looked, Opened, Rows, lengths
from fusion_jax.inspection.tables import Table, bad_lines, headline, number, percent

# What a position is; the place in this list is the number in `kinds`.
KINDS = ("padding", "text", "answer", "image", "tile", "row end", "latents")
PADDING, TEXT, ANSWER, IMAGE, TILE, ROW_END, LATENTS = range(7)
_COLOURS = ("#eef0f3", "#b9c3cf", "#f5b301", "#4a90d9", "#37b6a5", "#0b5a50", "#a86bd8")
_LEGEND = (
    "padding",
    "text",
    "supervised answer",
    "image (whole view)",
    "tile",
    "row end",
    "latents",
)
_THUMBNAIL = 160  # pixels of a side at most
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 14px 60px; max-width: 1180px; background: #fff; color: #1c2430;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 22px 0 4px; } h2 { font-size: 19px; margin: 40px 0 4px; padding-top: 12px;
  border-top: 3px solid #1c2430; }
h3 { font-size: 15px; margin: 26px 0 6px; } h4 { font-size: 13.5px; margin: 0 0 8px; overflow-wrap: anywhere; }
nav a { margin-right: 14px; } a { color: #1d5fa8; }
.note, .small { color: #5a6675; font-size: 13px; margin: 4px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e7ec; }
th { font-weight: 600; color: #46505e; border-bottom: 2px solid #9aa5b3; }
th:first-child, td:first-child, .notes td:last-child { text-align: left; } tr.all td { font-weight: 600;
  border-top: 2px solid #9aa5b3; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 14px; }
figure { margin: 0; } figcaption { font-size: 12.5px; color: #46505e; overflow-wrap: anywhere; }
.chart svg { width: 100%; height: auto; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; background: #fff6f4;
  border-left: 3px solid #d5573b; padding: 8px 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; margin: 8px 0; }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 5px;
  vertical-align: -2px; border: 1px solid #0002; }
.row { margin: 22px 0 34px; } .strip { width: 100%; height: 46px; display: block; border: 1px solid #c5ccd6;
  border-radius: 3px; }
.example { border: 1px solid #d5dbe3; border-left: 5px solid #5d6b7d; border-radius: 6px; padding: 10px 12px;
  margin: 10px 0; }
.example.even { border-left-color: #b48a3c; }
.images { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 8px; }
.views { display: flex; gap: 8px; align-items: flex-start; flex-wrap: wrap; }
.views img { display: block; width: 100%; height: auto; } .views.pixels img { image-rendering: pixelated; }
.whole { width: 150px; border: 2px solid #4a90d9; } .grid { display: grid; gap: 3px; padding: 2px;
  border: 2px solid #37b6a5; }
.quadrants { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; width: 150px; padding: 2px;
  border: 2px dashed #8a97a8; }
.zero { width: 90px; height: 90px; background: #808080; color: #fff; display: grid; place-items: center;
  font-size: 12px; text-align: center; }
.guide { font-size: 13px; margin: 6px 0; color: #46505e; } .guide .t { background: #e5f0fb; }
  .guide .off { text-decoration: line-through; color: #98a2ae; }
.tokens { margin: 8px 0 0; line-height: 2; overflow-wrap: anywhere; }
.t { white-space: pre-wrap; border-radius: 3px; padding: 1px 0; border-right: 1px solid #c3ccd7; background: #eef1f5;
  unicode-bidi: isolate; }
.t.answer { background: #ffe08a; } .t.end { box-shadow: 0 3px 0 #d5573b; } .nl { color: #98a2ae; }
.hp { color: #d5573b; font-size: 10px; font-weight: 700; vertical-align: super; margin: 0 2px; }
.v { border-radius: 10px; padding: 1px 9px; margin: 0 2px; color: #fff; font-size: 12.5px; white-space: nowrap; }
.v.image { background: #2f73ba; } .v.tile { background: #1b8a7b; } .v.latents { background: #8746bd; }
.t:hover, .v:hover { outline: 2px solid #1c2430; }
@media (hover: none) { .t:hover::after, .v:hover::after { content: attr(title); position: fixed; left: 0; right: 0;
  bottom: 0;
  padding: 10px 14px; background: #1c2430; color: #fff; font-size: 14px; line-height: 1.4; white-space: normal;
  z-index: 2; } }
@media (max-width: 640px) { .whole, .quadrants { width: 120px; } th, td { padding: 3px 6px; } }
"""


def page(sections: Sequence[tuple[str, str]]) -> str:
    """The document. sections: name and HTML of each stage, from `stage_section`."""
    links = "".join(f'<a href="#stage-{i}">{_text(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(f'<section id="stage-{i}">{content}</section>' for i, (_, content) in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the run will read</title><style>{_STYLE}</style></head>"
        f"<body><h1>What the run will read</h1><nav>{links}</nav>{body}</body></html>\n"
    )


def stage_section(
    figures: dict[str, Any], tables: Sequence[Table], opened: Opened, looked: Looked, rows: Sequence[Rows]
) -> tuple[str, str]:
    """A stage's name and its part of the page."""
    parts = [f"<h2>{_text(opened.stage.name)}</h2><p>{_text(headline(figures))}</p>"]
    parts.append(_charts(opened, looked))
    parts += [_table(table) for table in tables]
    if figures["bad_records"]:
        parts.append(f"<h3>bad records</h3><pre>{_text(chr(10).join(bad_lines(figures)))}</pre>")
    if rows:
        parts.append(f"<h3>rows of the run's first steps</h3>{_legend()}")
    for some in rows:
        parts.append(_rows(some, opened.tokenizer))
    return opened.stage.name, "".join(parts)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_text(head)}</th>" for head in table.heads)
    lines = []
    for line in table.lines:
        kind = ' class="all"' if line[0] == "all" and line is table.lines[-1] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>")
    kind = "notes" if table.notes else ""
    return (
        f'<h3>{_text(table.title)}</h3><div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{_text(table.note)}</p>'
    )


# Charts.


def _charts(opened: Opened, looked: Looked) -> str:
    """Histograms over the sample."""
    sample = looked.records[: looked.sample]
    good = sample[sample["good"] > 0]
    if not len(good):
        return '<p class="note">None of the records looked at can be used.</p>'
    of = lengths(opened, sample)
    charts = [
        histogram(of["length"], "positions of a conversation, visual ones included", limit=opened.stage.max_length),
        histogram(of["text"], "text tokens"),
        histogram(of["visual"], "visual tokens"),
        histogram(good["supervised"], "supervised tokens"),
        histogram(good["question"][good["images"] > 0], "question tokens that guide the encoder"),
        histogram(good["answers"], "rounds"),
    ]
    return f'<h3>over the sample</h3><div class="charts">{"".join(charts)}</div>'


def histogram(values: np.ndarray, title: str, limit: int | None = None, most: int = 30) -> str:
    """An SVG of how often values occur: a bar each where they are few, else bins of equal width from 0."""
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
        f'<figure class="chart"><figcaption>{_text(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
        f'<line x1="{left}" x2="{width - left}" y1="{base}" y2="{base}" stroke="#9aa5b3"/>{"".join(drawn)}'
        f'<text x="{left}" y="{base + 14}" font-size="10.5" fill="#46505e">0</text><text x="{right:.1f}" '
        f'y="{base + 14}" font-size="10.5" fill="#46505e" text-anchor="{where}">{end}</text></svg></figure>'
    )


# Rows.


def kinds(batch: Batch, row: int, spec: LayoutSpec) -> np.ndarray:
    """What every position of a row is: (S,) int64, places in `KINDS`."""
    index, segments = batch.visual_index[row], batch.segment_ids[row]
    tiles = spec.crops * spec.image_tokens
    ends = tiles + spec.crops * spec.tile_tokens
    latents = ends + (1 if spec.grids else 0)
    found = np.where(segments > 0, TEXT, PADDING)
    found[1:][batch.loss_weights[row, :-1] > 0] = ANSWER  # a target stands one before its token
    for start, kind in ((0, IMAGE), (tiles, TILE), (ends, ROW_END), (latents, LATENTS)):
        found[index >= start] = kind
    return found


def _legend() -> str:
    marks = "".join(f'<span><i style="background:{c}"></i>{name}</span>' for name, c in zip(_LEGEND, _COLOURS))
    return (
        f'<div class="legend">{marks}<span><b class="hp">H_P</b>end of a round\'s question</span></div>'
        "<p class=\"note\">Above the strip's colours: the examples of the row in turns. A token's title has its number "
        "and places; its tint says whether it is supervised.</p>"
    )


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(value, start, end) of equal neighbours."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *cuts.tolist()] if len(values) else []
    return [(int(values[start]), start, end) for start, end in zip(starts, [*starts[1:], len(values)])]


def _count(count: int, what: str) -> str:
    return f"{number(count)} {what}{'s' * (count != 1)}"


def _strip(batch: Batch, row: int, found: np.ndarray) -> str:
    drawn = []
    for segment, start, end in _runs(batch.segment_ids[row]):
        if segment:
            colour = "#5d6b7d" if segment % 2 else "#b48a3c"
            drawn.append(_bar(start, end, 0, 7, colour, f"example {segment}: positions {start}–{end - 1}"))
    for kind, start, end in _runs(found):
        drawn.append(_bar(start, end, 8, 32, _COLOURS[kind], f"{_LEGEND[kind]}: {start}–{end - 1} ({end - start})"))
    wide = max(1.0, len(found) / 400)  # a line that stays visible
    for place in batch.round_end[row][batch.round_end[row] >= 0].tolist():
        drawn.append(_bar(place, place + wide, 40, 6, "#d5573b", f"H_P at {place}"))
    return f'<svg class="strip" viewBox="0 0 {len(found)} 46" preserveAspectRatio="none">{"".join(drawn)}</svg>'


def _bar(start: float, end: float, y: int, height: int, colour: str, title: str) -> str:
    return (
        f'<rect x="{start}" y="{y}" width="{end - start:g}" height="{height}" fill="{colour}">'
        f"<title>{_text(title)}</title></rect>"
    )


def _rows(some: Rows, tokenizer: Tokenizer) -> str:
    batch, parts, slot = some.batch, [], 0
    per_group = len(some.examples) // len(batch.crops)
    for row, examples in enumerate(some.examples):
        slot = 0 if row % per_group == 0 else slot  # a group's rows share a table of crops
        if not examples:
            continue
        found = kinds(batch, row, some.spec)
        filled = int((found != PADDING).sum())
        latents = f"l² = {batch.latent_count}, " if batch.latent_count else ""
        parts.append(
            f'<div class="row"><h3>step {some.step + 1}, row {row + 1}: {latents}{_count(len(examples), "example")}, '
            f"{number(filled)} of {number(len(found))} positions ({percent(filled / len(found))})</h3>"
            f"{_strip(batch, row, found)}"
        )
        for i, example in enumerate(examples, 1):
            shown = _Shown(some, row, row // per_group, slot, i, found)
            parts.append(_example(shown, example, tokenizer))
            slot += measure(example, some.spec, 0).crops
        parts.append("</div>")
    for bad in some.missing:
        parts.append(f"<pre>left out, its image is bad: {_text(str(bad))}</pre>")
    return "".join(parts)


@dataclass(frozen=True)
class _Shown:
    """One example: its row and group, its first crop in the group's table, its segment; the row's `kinds`."""

    rows: Rows
    row: int
    group: int
    slot: int
    segment: int
    kinds: np.ndarray


def _example(shown: _Shown, example: Example, tokenizer: Tokenizer) -> str:
    batch, spec = shown.rows.batch, shown.rows.spec
    takes = measure(example, spec, 0)
    places = np.flatnonzero(batch.segment_ids[shown.row] == shown.segment)
    supervised = int((shown.kinds[places] == ANSWER).sum())
    cut = f", {_count(example.dropped_rounds, 'last round')} left out" if example.dropped_rounds else ""
    parts = [
        f'<div class="example{"" if shown.segment % 2 else " even"}"><h4>{_text(example.where)}</h4><p class="small">'
        f"positions {places[0]}–{places[-1]}, {_count(supervised, 'supervised token')}, "
        f"{_count(takes.crops, 'crop')}{cut}</p>"
    ]
    images, at = [], shown.slot
    for tiling in example.tilings or (WHOLE,) * example.images:
        images.append((at, tiling))
        at += tiling.crops
    if images:
        drawn = [_image(batch, shown.group, first, tiling, i, spec) for i, (first, tiling) in enumerate(images, 1)]
        parts.append(f'<div class="images">{"".join(drawn)}</div>{_guide(batch, shown.group, shown.slot, tokenizer)}')
    elif takes.crops and batch.crop_kind[shown.group, shown.slot] == ZERO_IMAGE:
        parts.append('<div class="zero">a zero image</div>')
    parts.append(f'<p class="tokens">{_tokens(shown, places, images, tokenizer)}</p></div>')
    return "".join(parts)


def _image(batch: Batch, group: int, slot: int, tiling: Tiling, which: int, spec: LayoutSpec) -> str:
    """The crops of an image as the encoder gets them."""
    crops, quadrants, tokens = batch.crops[group], batch.quadrants[group, slot], spec.tokens_of(tiling)
    said = [f"image {which}: {number(tokens)} tokens"]
    views = [f'<div class="whole">{_picture(crops[slot], f"image {which}, whole view")}</div>']
    if tiling.rows:
        said.append(
            f"{spec.image_tokens} of the whole view, {tokens - spec.image_tokens} of {tiling.rows} x {tiling.columns} "
            "tiles with row ends"
        )
        tiles = range(slot + 1, slot + tiling.crops)
        drawn = "".join(_picture(crops[k], f"image {which}, tile {k - slot}") for k in tiles)
        columns = f"grid-template-columns:repeat({tiling.columns},1fr);width:min(100%,{110 * tiling.columns}px)"
        views.append(f'<div class="grid" style="{columns}">{drawn}</div>')
    if len(quadrants):
        said.append("four plain quadrants for the exchange")
        drawn = "".join(_picture(one, f"image {which}, quadrant {q}") for q, one in enumerate(quadrants, 1))
        views.append(f'<div class="quadrants">{drawn}</div>')
    small = " pixels" if spec.image_size < _THUMBNAIL // 2 else ""
    return (
        f'<figure><div class="views{small}">{"".join(views)}</div><figcaption>{"; ".join(said)}</figcaption></figure>'
    )


def _picture(pixels: np.ndarray, alt: str) -> str:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if max(image.size) > 64:
        kind = "jpeg"
        image.save(file, kind, quality=85)
    else:
        kind = "png"
        image.save(file, kind)
    return f'<img alt="{alt}" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def _guide(batch: Batch, group: int, slot: int, tokenizer: Tokenizer) -> str:
    """The question tokens that the crops of an example are encoded with."""
    ids, mask = batch.crop_text[group, slot], batch.crop_text_mask[group, slot]
    last = np.flatnonzero((ids != 0) | mask)
    if not len(last):
        return '<p class="guide">no question guides the encoder</p>'
    drawn = []
    for i, shown in enumerate(_pieces(tokenizer, ids[: last[-1] + 1])):
        kind, note = ("t", "") if mask[i] else ("t off", ", hidden from the encoder")
        drawn.append(f'<span class="{kind}" title="id {ids[i]} · question token {i}{note}">{shown}</span>')
    return f'<p class="guide">{_count(int(mask.sum()), "question token")} for the encoder: {"".join(drawn)}</p>'


def _tokens(shown: _Shown, places: np.ndarray, images: Sequence[tuple[int, Tiling]], tokenizer: Tokenizer) -> str:
    """An example token by token; an image's and a round's latents are one mark each."""
    batch, row, spec, found = shown.rows.batch, shown.row, shown.rows.spec, shown.kinds
    ends, starts = set(batch.round_end[row].tolist()), batch.latent_start[row].tolist()
    which = {slot: i for i, (slot, _) in enumerate(images, 1)}
    grouped = np.where(found == ROW_END, TILE, found)[places]
    drawn = []
    for kind, start, end in _runs(np.where(np.isin(grouped, (IMAGE, TILE, LATENTS)), grouped, TEXT)):
        first, count = int(places[start]), end - start
        if kind == TEXT:
            run = places[start:end].tolist()
            for place, text in zip(run, _pieces(tokenizer, batch.tokens[row, run])):
                drawn.append(_token(batch, row, place, text, bool(found[place] == ANSWER), place in ends))
            continue
        if kind == IMAGE:
            name = "image"
            said = f"image {which[int(batch.visual_index[row, first]) // spec.image_tokens]} · {count}"
        elif kind == TILE:
            name, lines = "tile", int((found[places[start:end]] == ROW_END).sum())
            said = f"tiles · {lines} rows of {count // lines - 1} + row end"
        else:
            name, seen = "latents", which.get(int(batch.round_crop[row, starts.index(first)]))
            said = f"{count} latents ← {f'image {seen}' if seen else 'zero image'}"
        title = (
            f"positions {start}–{end - 1} (row {first}–{first + count - 1}) · segment {shown.segment} · not supervised"
        )
        drawn.append(f'<span class="v {name}" title="{title}">{said}</span> ')
    return "".join(drawn)


def _token(batch: Batch, row: int, place: int, text: str, answer: bool, end: bool) -> str:
    supervised = f"supervised: predicted at row place {place - 1}" if answer else "not supervised"
    title = (
        f"id {batch.tokens[row, place]} · position {batch.positions[row, place]} (row {place}) · "
        f"segment {batch.segment_ids[row, place]} · {supervised}" + (" · H_P is read here" if end else "")
    )
    mark = '<b class="hp">H_P</b>' if end else ""
    return f'<span class="t{" answer" * answer}{" end" * end}" title="{title}">{text}</span>{mark}'


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text, as HTML. Of tokens that share a character the first has it."""
    front = tokenizer.vision_end_id  # the first of a text may lose its leading space
    skip = len(tokenizer.decode([front], skip_special=False))

    def read(start: int, end: int) -> str:
        return tokenizer.decode([front, *ids[start:end]], skip_special=False)[skip:]

    texts, ids = [], [int(i) for i in ids]
    while len(texts) < len(ids):
        at = len(texts)
        ends = range(at + 1, min(at + 4, len(ids)) + 1)  # a character has four bytes at most
        end = next((end for end in ends if "\ufffd" not in read(at, end)), at + 1)
        texts += [read(at, end), *[""] * (end - at - 1)]
    return [_text(text or "·").replace("\n", '<span class="nl">↵</span>\n') for text in texts]
