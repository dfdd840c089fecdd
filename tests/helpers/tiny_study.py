"""A study of the tiny run: two variants and, with `,guide`, a third that is only evaluated in another way.

`tiny_study.py:DATA` has variants of one stage of eight steps, on data that exist; values after it replace keys of the
study.
"""

import ast
from pathlib import Path

from ml_collections import ConfigDict

BASE = Path(__file__).with_name("tiny_run.py")


def get_config(argument: str = "data"):
    data, *changes = argument.split(",")
    values = {
        "base": f"{BASE}:{data},survival,steps=4,log_every=2,checkpoint_every=2",
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
