"""A study of the tiny run, `tiny_study.py:DATA`: two variants, two seeds, one stage of four steps, on data that exist.

Values after it, with semicolons between them, replace keys of the study: `tiny_study.py:DATA;seeds=1`. With `guide`
there is a third variant, which is only evaluated in another way.
"""

import ast
from pathlib import Path

from ml_collections import ConfigDict

BASE = Path(__file__).with_name("tiny_stage.py")


def get_config(argument: str = "data"):
    data, *changes = argument.split(";")
    values = {
        "base": f"{BASE}:{data}",
        "about": "Expected: nothing.\n\npython -m fusion_jax.study --config ...",
        "variants": {"with A": {}, "without A": {"model.text_guided": False}},
        "baseline": "without A",
        "seeds": 2,
        "evaluation": ConfigDict({"data_dir": data, "limit": 0}),
        "published": {"source": "A table.", "columns": ("MMBench",), "rows": {"with A": (73.5,)}},
    }
    if "guide" in changes:
        changes.remove("guide")
        values["variants"]["no question"] = {"evaluation.guide": "none"}
    for key, _, value in (change.partition("=") for change in changes):
        values[key] = ast.literal_eval(value)
    return ConfigDict(values, convert_dict=False)
