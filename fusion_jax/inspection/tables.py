"""Formats the figures of an inspection as tables, for the terminal and for the page."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_jax.files import printable


@dataclass(frozen=True)
class Table:
    """Texts to align: a line of column heads, and lines of cells of which the first is the line's name. notes: whether
    the last column holds remarks, not figures."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""
    notes: bool = False


def stage_tables(figures: dict[str, Any]) -> list[Table]:
    """Returns tables of the stage's figures, data set by data set, and of what its steps hold."""
    sets = [*figures["parts"], figures["all"]] if len(figures["parts"]) > 1 else [figures["all"]]
    if len(sets) == 1:
        sets = [{**figures["all"], "name": figures["parts"][0]["name"]}]
    limit, largest = figures["max_length"], max(figures["latent_counts"], default=0)

    def lines(cells) -> list[list[str]]:
        return [[one["name"], *cells(one)] for one in sets]

    def spread(of: dict | None) -> list[str]:
        return [number(of and of[name]) for name in ("median", "p95", "max")]

    latents = f", {number(largest)} latents a round (the largest l²)" if largest else ""
    decoded = "" if figures["all"]["images_decoded_of"] else " No image was decoded."
    tables = [
        Table(
            "records",
            _heads("records, share, measured, bad, images read of, bad images, shortened, rounds lost"),
            lines(
                lambda one: [
                    number(one["records"]),
                    percent(one["share"]),
                    number(one["looked_at"]),
                    number(one["bad"]),
                    number(one["images_decoded_of"]),
                    number(one["bad_images"]),
                    number(one["shortened"]),
                    number(one["dropped_rounds"]),
                ]
            ),
            "records: weighted, as an epoch draws them. bad: by their text, of those measured. Shortened: without the "
            f"last rounds, which would not fit.{decoded}",
        ),
        Table(
            "length in positions",
            _heads("text, 95%, max, visual, 95%, max, together, 95%, max, of a row"),
            lines(
                lambda one: [
                    *spread(one["text"]),
                    *spread(one["visual"]),
                    *spread(one["length"]),
                    percent(one["length"] and one["length"]["mean"] / limit),
                ]
            ),
            f"medians, then what 95% stay below, then the longest; visual: image tokens{latents}. of a row: the mean's "
            f"share of max_length {number(limit)}.",
        ),
        Table(
            "content, a record",
            _heads("images, text only, crops, tokens/image, rounds, max, question, 95%, max, supervised, 95%, max"),
            lines(
                lambda one: [
                    mean(one["images"]),
                    percent(one["text_only"]),
                    mean(one["crops"]),
                    number(one["tokens_per_image"]),
                    mean(one["rounds"]),
                    number(one["rounds"] and one["rounds"]["max"]),
                    *spread(one["question"]),
                    *spread(one["supervised"]),
                ]
            ),
            "images, crops (guided passes of the encoder) and rounds: means; tokens/image: in the sequence; question: "
            "tokens that guide the encoder.",
        ),
        Table(
            "cost",
            _heads("FLOPs a sample, of the stage, share of records"),
            lines(
                lambda one: [
                    scaled(one["flops_per_sample"]),
                    percent(one["share_of_flops"]),
                    percent(one["share"]),
                ]
            ),
            "model FLOPs of training (forward and backward, padding and recomputation left out), mean over l².",
        ),
    ]
    if figures["step"]:
        tables.append(_step_table(figures["step"], figures))
    return tables


def _heads(names: str) -> list[str]:
    return ["data set", *names.split(", ")]


def _step_table(step: dict[str, Any], figures: dict[str, Any]) -> Table:
    fewest, most = step["crops_per_group"]
    crops = f"{fewest} to {most}" if fewest < most else str(most)
    crops = f"{step['groups']} x {crops}" if step["groups"] > 1 else crops
    lines = [
        ("samples", f"{step['samples']:.1f}", f"batch_size {figures['batch_size']}"),
        ("rows", number(step["rows"]), f"of {number(step['positions_of_a_row'])} positions"),
        ("empty rows", f"{step['empty_rows']:.1f}", ""),
        ("positions that hold something", percent(step["filled_positions"]), f"of {number(step['positions'])}"),
        ("a row each, padded to the longest", percent(step["padded_to_longest"]), "would hold something"),
        ("crops", crops, "groups x crops" if step["groups"] > 1 else ""),
        ("crops that hold something", percent(step["filled_crops"]), ""),
        ("steps of text alone", percent(step["text_only_steps"]), "without the encoder"),
        *(
            (f"steps with questions of up to {length} tokens", percent(share), "")
            for length, share in step["question_lengths"].items()
            if len(step["question_lengths"]) > 1
        ),
        ("text tokens", number(step["text"]), f"of which supervised: {number(step['supervised'])}"),
        ("FLOPs", scaled(step["flops"]), f"the stage: {scaled(step['stage_flops'])}"),
    ]
    note = f"means of the run's first {step['steps_planned']} steps, planned as in training."
    return Table("a step", ("", "packed" if step["packing"] else "a sample a row", ""), lines, note, True)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def mean(of: dict | None) -> str:
    return "–" if of is None else f"{of['mean']:.2f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def scaled(value: float | None) -> str:
    """Writes a number with a metric prefix: 1.23 T."""
    if value is None:
        return "–"
    power = min(int(math.log10(max(value, 1))) // 3, 7)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}".rstrip()


def as_text(figures: dict[str, Any], tables: Sequence[Table]) -> str:
    """Formats the tables for a terminal."""
    blocks = [f"=== {headline(figures)} ==="]
    for table in tables:
        lines = [list(map(printable, line)) for line in (table.heads, *table.lines)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(table.heads))]
        last = len(widths) - 1 if table.notes else None
        drawn = [
            "  ".join(
                cell.ljust(width) if i in (0, last) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, drawn))
        blocks.append("\n".join([table.title.upper(), drawn[0], rule, *drawn[1:], textwrap.fill(table.note, 110)]))
    if figures["bad_records"]:
        blocks.append("\n".join(["BAD RECORDS", *map(printable, bad_lines(figures))]))
    return "\n\n".join(blocks) + "\n"


def headline(figures: dict[str, Any]) -> str:
    parts = len(figures["parts"])
    return (
        f"{figures['stage']}: {number(figures['all']['records'])} records in {parts} data set{'s' * (parts != 1)} "
        f"of {figures['data']}, {number(figures['steps'])} steps ({figures['epochs']:.3g} epochs); "
        f"{number(figures['looked_at'])} records measured"
    )


def bad_lines(figures: dict[str, Any]) -> list[str]:
    """Returns a line for each reason, and under it lines for its first records."""
    lines = []
    for entry in figures["bad_records"]:
        seen = "of the images read" if entry["seen_in"] == "image" else "by the text"
        lines += [
            f"{entry['count']} x {entry['reason']} ({seen})",
            *(f"    {example}" for example in entry["examples"]),
        ]
    if figures["bad_share"] > figures["max_bad_records"]:
        lines.append(
            f"Together about {percent(figures['bad_share'])} of the records: more than max_bad_records="
            f"{figures['max_bad_records']:g} allows, so training would stop."
        )
    return lines
