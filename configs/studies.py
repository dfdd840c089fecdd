"""Shares what all shipped studies have in common: the base of a study, and how its runs are evaluated.

Without an argument a study varies the quickstart, on data drawn for each seed. Its argument names another base:

python -m fusion_jax.study --config configs/study_components.py --out runs/components
python -m fusion_jax.study --config configs/study_components.py:configs/flare.py:l_3b --out runs/components_3b
"""

from ml_collections import ConfigDict

from fusion_jax.command_line.config_flag import load_config

QUICKSTART = "configs/quickstart.py:{data}"
# The columns of the paper's component study: its other studies have the first alone.
BENCHMARKS = ("mmbench_en_dev", "seed_image", "cv_bench", "mmvp")
SMALL = {
    "data": "configs/quickstart_data.py",
    "common": {"keep_checkpoints": 1, "sample_answers": 0},
    # Runs of about five minutes on two cores.
    "steps_share": 0.5,
    "evaluation": {"tasks": ("held_out",), "data_dir": "{data}"},
}
FULL = {
    "data": "",
    "common": {},
    "steps_share": 1.0,
    "evaluation": {"tasks": BENCHMARKS, "data_dir": "benchmarks"},
}


def model_of(base: str) -> ConfigDict:
    """The model of a base, for studies whose variants depend on it."""
    return load_config(base or QUICKSTART).model


def make(base: str, about: str, variants: dict, baseline: str, published: dict | None = None) -> ConfigDict:
    """Makes a study.

    Args:
      base: config file of a run with its argument; empty: the quickstart.
      about: what is expected and why. variants: {name: {key: value}}. published: see `PublishedConfig`.
    """
    values = (FULL if base else SMALL) | {
        "base": base or QUICKSTART,
        "about": about,
        "variants": variants,
        "baseline": baseline,
        "seeds": 5,
    }
    if published is not None:
        values["published"] = published
    values["evaluation"] = ConfigDict({"limit": 0, "batch_size": 32} | values["evaluation"])
    return ConfigDict(values, convert_dict=False)  # keys of variants have dots
