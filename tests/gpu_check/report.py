"""The report of the check: JSON and Markdown, written whole after every change, so that a cut leaves the last one."""

import json
import math
import os
import time
from pathlib import Path

WAITING, RUNNING, PASSED, FAILED, CUT, NOT_RUN = "waiting", "running", "passed", "failed", "cut", "not run"


class Report:
    """`parts`: name -> {title, note, state, seconds, failures, figures}; `folder` gets report.json and report.md."""

    def __init__(self, folder: Path, parts: dict[str, str], minutes: float, dry_run: bool):
        self._folder = folder
        self.values = {
            "state": RUNNING,
            "begun": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "minutes": minutes,
            "dry_run": dry_run,
            "parts": {
                name: {"title": title, "note": "", "state": WAITING, "seconds": 0.0, "failures": [], "figures": {}}
                for name, title in parts.items()
            },
        }
        self.write()

    def set(self, name: str, **values) -> None:
        self.values["parts"][name].update(values)
        self.write()

    def end(self, state: str) -> None:
        """Parts that are still running are cut, those that wait are not run."""
        for part in self.values["parts"].values():
            part["state"] = {RUNNING: CUT, WAITING: NOT_RUN}.get(part["state"], part["state"])
        self.values["state"] = state
        self.write()

    @property
    def passed(self) -> bool:
        return all(part["state"] == PASSED for part in self.values["parts"].values())

    def write(self) -> None:
        for name, text in (("report.json", json.dumps(_plain(self.values), indent=1)), ("report.md", self.markdown())):
            new = self._folder / ".new"
            new.write_text(text + "\n")
            os.replace(new, self._folder / name)

    def markdown(self) -> str:
        values = self.values
        kind = " (dry run: tiny shapes on a CPU, the figures mean nothing)" if values["dry_run"] else ""
        lines = [
            f"# GPU check{kind}",
            "",
            f"Begun {values['begun']}, {values['minutes']:g} minutes allowed; {values['state']}.",
        ]
        rows = [
            {
                "part": name,
                "result": part["state"],
                "seconds": round(part["seconds"], 1),
                "why": "; ".join(part["failures"]),
            }
            for name, part in values["parts"].items()
        ]
        lines += ["", *_table(rows)]
        for part in values["parts"].values():
            if part["figures"]:
                lines += ["", f"## {part['title']}", "", *[part["note"], ""] * bool(part["note"])]
                lines += _figures(part["figures"], 3)
        return "\n".join(lines)


def _figures(figures: dict, level: int) -> list[str]:
    """Single values as one table, lists of rows as one each, dicts under a heading of their own."""
    single = [{"figure": k, "value": v} for k, v in figures.items() if not isinstance(v, (list, dict))]
    lines = _table(single) if single else []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += ["", f"{'#' * level} {name}", "", *_figures(value, level + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += ["", f"{'#' * level} {name}", "", *_table(value)]
        elif isinstance(value, list):
            lines += ["", f"{name}: {', '.join(map(_text, value))}"]
    return lines


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |" for row in rows]


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}" if math.isfinite(value) else str(value)
    return " ".join(str(value).replace("|", "/").split())


def _plain(value):
    """Without NaN and infinities, which JSON does not know: they become text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
