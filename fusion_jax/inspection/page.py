"""Writes the page of an inspection: one HTML file without scripts that fetches nothing.

Conversations, names and reasons come from data files: they are written as text, never as markup, and a content security
policy allows neither scripts nor requests.
"""

from collections.abc import Sequence
from typing import Any

from fusion_jax.inspection.charts import stage_charts
from fusion_jax.inspection.markup import escape
from fusion_jax.inspection.rows import legend, show_rows
from fusion_jax.inspection.sample import Sample, StageData
from fusion_jax.inspection.steps import Rows
from fusion_jax.inspection.tables import Table, bad_lines, headline

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
    """Writes the document. sections: name and HTML of each stage, from `stage_section`."""
    links = "".join(f'<a href="#stage-{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(f'<section id="stage-{i}">{content}</section>' for i, (_, content) in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the run will read</title><style>{_STYLE}</style></head>"
        f"<body><h1>What the run will read</h1><nav>{links}</nav>{body}</body></html>\n"
    )


def stage_section(
    figures: dict[str, Any], tables: Sequence[Table], data: StageData, sample: Sample, rows: Sequence[Rows]
) -> tuple[str, str]:
    """Returns a stage's name and its part of the page."""
    parts = [f"<h2>{escape(data.stage.name)}</h2><p>{escape(headline(figures))}</p>"]
    parts.append(stage_charts(data, sample))
    parts += [_table(table) for table in tables]
    if figures["bad_records"]:
        parts.append(f"<h3>bad records</h3><pre>{escape(chr(10).join(bad_lines(figures)))}</pre>")
    if rows:
        parts.append(f"<h3>rows of the run's first steps</h3>{legend()}")
    for one in rows:
        parts.append(show_rows(one, data.tokenizer))
    return data.stage.name, "".join(parts)


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    lines = []
    for line in table.lines:
        kind = ' class="all"' if line[0] == "all" and line is table.lines[-1] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>")
    kind = "notes" if table.notes else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{escape(table.note)}</p>'
    )
