"""tests/tiny_run.py cut down to one stage of four steps, for runs of several processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_run


def get_config(arguments: str = "data"):
    """`arguments`: the folder of the data and, after a comma, the number of steps."""
    data, _, steps = arguments.partition(",")
    config = tiny_run.get_config(data)
    config.model.latent_counts = (4,)
    stage = {**config.stages[1], "steps": int(steps or 4), "accumulation": 1}
    config.stages = [stage]
    config.update({"checkpoint_every": 2, "validate_every": 4, "sample_answers": 1})
    return config
