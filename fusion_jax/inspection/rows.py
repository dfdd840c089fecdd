"""Draws rows of a run's first steps on the page: pictures, every token, what is supervised."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fusion_jax.batch import ZERO_IMAGE, Batch
from fusion_jax.data.layout import Example, LayoutSpec, measure
from fusion_jax.data.tiles import WHOLE, Tiling
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.inspection.markup import escape
from fusion_jax.inspection.steps import Rows
from fusion_jax.inspection.tables import number, percent

# The kinds of positions; `kinds` returns indices into this tuple.
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


def kinds(batch: Batch, row: int, spec: LayoutSpec) -> np.ndarray:
    """Returns the kind of every position of a row: (S,) int64 indices into `KINDS`."""
    index, segments = batch.visual_index[row], batch.segment_ids[row]
    tiles = spec.crops * spec.image_tokens
    ends = tiles + spec.crops * spec.tile_tokens
    latents = ends + (1 if spec.grids else 0)
    kind_of = np.where(segments > 0, TEXT, PADDING)
    kind_of[1:][batch.loss_weights[row, :-1] > 0] = ANSWER  # a target is one position before its token
    for start, kind in ((0, IMAGE), (tiles, TILE), (ends, ROW_END), (latents, LATENTS)):
        kind_of[index >= start] = kind
    return kind_of


def legend() -> str:
    marks = "".join(f'<span><i style="background:{c}"></i>{name}</span>' for name, c in zip(_LEGEND, _COLOURS))
    return (
        f'<div class="legend">{marks}<span><b class="hp">H_P</b>end of a round\'s question</span></div>'
        "<p class=\"note\">Above the strip's colours: the examples of the row in turns. A token's title has its number "
        "and places; its tint says whether it is supervised.</p>"
    )


def show_rows(rows: Rows, tokenizer: Tokenizer) -> str:
    batch, parts, slot = rows.batch, [], 0
    per_group = len(rows.examples) // len(batch.crops)
    for row, examples in enumerate(rows.examples):
        slot = 0 if row % per_group == 0 else slot  # a group's rows share a table of crops
        if not examples:
            continue
        kind_of = kinds(batch, row, rows.spec)
        filled = int((kind_of != PADDING).sum())
        latents = f"l² = {batch.latent_count}, " if batch.latent_count else ""
        parts.append(
            f'<div class="row"><h3>step {rows.step + 1}, row {row + 1}: {latents}{_count(len(examples), "example")}, '
            f"{number(filled)} of {number(len(kind_of))} positions ({percent(filled / len(kind_of))})</h3>"
            f"{_strip(batch, row, kind_of)}"
        )
        for i, example in enumerate(examples, 1):
            shown = _Shown(rows, row, row // per_group, slot, i, kind_of)
            parts.append(_example(shown, example, tokenizer))
            slot += measure(example, rows.spec, 0).crops
        parts.append("</div>")
    for bad in rows.missing:
        parts.append(f"<pre>left out, its image is bad: {escape(str(bad))}</pre>")
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


def _strip(batch: Batch, row: int, kind_of: np.ndarray) -> str:
    drawn = []
    for segment, start, end in _runs(batch.segment_ids[row]):
        if segment:
            colour = "#5d6b7d" if segment % 2 else "#b48a3c"
            drawn.append(_bar(start, end, 0, 7, colour, f"example {segment}: positions {start}–{end - 1}"))
    for kind, start, end in _runs(kind_of):
        drawn.append(_bar(start, end, 8, 32, _COLOURS[kind], f"{_LEGEND[kind]}: {start}–{end - 1} ({end - start})"))
    wide = max(1.0, len(kind_of) / 400)  # a line that stays visible
    for place in batch.round_end[row][batch.round_end[row] >= 0].tolist():
        drawn.append(_bar(place, place + wide, 40, 6, "#d5573b", f"H_P at {place}"))
    return f'<svg class="strip" viewBox="0 0 {len(kind_of)} 46" preserveAspectRatio="none">{"".join(drawn)}</svg>'


def _bar(start: float, end: float, y: int, height: int, colour: str, title: str) -> str:
    return (
        f'<rect x="{start}" y="{y}" width="{end - start:g}" height="{height}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (value, start, end) of each run of equal neighbours."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *cuts.tolist()] if len(values) else []
    return [(int(values[start]), start, end) for start, end in zip(starts, [*starts[1:], len(values)])]


def _count(count: int, what: str) -> str:
    return f"{number(count)} {what}{'s' * (count != 1)}"


def _example(shown: _Shown, example: Example, tokenizer: Tokenizer) -> str:
    batch, spec = shown.rows.batch, shown.rows.spec
    takes = measure(example, spec, 0)
    places = np.flatnonzero(batch.segment_ids[shown.row] == shown.segment)
    supervised = int((shown.kinds[places] == ANSWER).sum())
    cut = f", {_count(example.dropped_rounds, 'last round')} left out" if example.dropped_rounds else ""
    parts = [
        f'<div class="example{"" if shown.segment % 2 else " even"}"><h4>{escape(example.where)}</h4><p class="small">'
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
    """Draws the crops of an image as the encoder gets them."""
    crops, quadrants, tokens = batch.crops[group], batch.quadrants[group, slot], spec.tokens_of(tiling)
    parts = [f"image {which}: {number(tokens)} tokens"]
    views = [f'<div class="whole">{_picture(crops[slot], f"image {which}, whole view")}</div>']
    if tiling.rows:
        parts.append(
            f"{spec.image_tokens} of the whole view, {tokens - spec.image_tokens} of {tiling.rows} x {tiling.columns} "
            "tiles with row ends"
        )
        tiles = range(slot + 1, slot + tiling.crops)
        drawn = "".join(_picture(crops[k], f"image {which}, tile {k - slot}") for k in tiles)
        columns = f"grid-template-columns:repeat({tiling.columns},1fr);width:min(100%,{110 * tiling.columns}px)"
        views.append(f'<div class="grid" style="{columns}">{drawn}</div>')
    if len(quadrants):
        parts.append("four plain quadrants for the exchange")
        drawn = "".join(_picture(one, f"image {which}, quadrant {q}") for q, one in enumerate(quadrants, 1))
        views.append(f'<div class="quadrants">{drawn}</div>')
    small = " pixels" if spec.image_size < _THUMBNAIL // 2 else ""
    return (
        f'<figure><div class="views{small}">{"".join(views)}</div><figcaption>{"; ".join(parts)}</figcaption></figure>'
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
    """Writes the question tokens that guide the crops of an example."""
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
    """Writes an example token by token; an image's tokens and a round's latents are one mark each."""
    batch, row, spec, kind_of = shown.rows.batch, shown.row, shown.rows.spec, shown.kinds
    ends, starts = set(batch.round_end[row].tolist()), batch.latent_start[row].tolist()
    which = {slot: i for i, (slot, _) in enumerate(images, 1)}
    grouped = np.where(kind_of == ROW_END, TILE, kind_of)[places]
    drawn = []
    for kind, start, end in _runs(np.where(np.isin(grouped, (IMAGE, TILE, LATENTS)), grouped, TEXT)):
        first, count = int(places[start]), end - start
        if kind == TEXT:
            run = places[start:end].tolist()
            for place, text in zip(run, _pieces(tokenizer, batch.tokens[row, run])):
                drawn.append(_token(batch, row, place, text, bool(kind_of[place] == ANSWER), place in ends))
            continue
        if kind == IMAGE:
            name = "image"
            caption = f"image {which[int(batch.visual_index[row, first]) // spec.image_tokens]} · {count}"
        elif kind == TILE:
            name, lines = "tile", int((kind_of[places[start:end]] == ROW_END).sum())
            caption = f"tiles · {lines} rows of {count // lines - 1} + row end"
        else:
            name, seen = "latents", which.get(int(batch.round_crop[row, starts.index(first)]))
            caption = f"{count} latents ← {f'image {seen}' if seen else 'zero image'}"
        title = (
            f"positions {start}–{end - 1} (row {first}–{first + count - 1}) · segment {shown.segment} · not supervised"
        )
        drawn.append(f'<span class="v {name}" title="{title}">{caption}</span> ')
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
    """Returns each token's text, as HTML. If tokens share a character, the first has it."""
    front = tokenizer.vision_end_id  # the first token of a text may lose its leading space
    skip = len(tokenizer.decode([front], skip_special=False))

    def read(start: int, end: int) -> str:
        return tokenizer.decode([front, *ids[start:end]], skip_special=False)[skip:]

    texts, ids = [], [int(i) for i in ids]
    while len(texts) < len(ids):
        at = len(texts)
        ends = range(at + 1, min(at + 4, len(ids)) + 1)  # a character has four bytes at most
        end = next((end for end in ends if "\ufffd" not in read(at, end)), at + 1)
        texts += [read(at, end), *[""] * (end - at - 1)]
    return [escape(text or "·").replace("\n", '<span class="nl">↵</span>\n') for text in texts]
