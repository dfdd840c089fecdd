"""The tiny run with one stage of four steps, which starts and ends as fast as a run can: `tiny_stage.py:DATA`."""

from helpers import tiny_run


def get_config(data: str = "data"):
    config = tiny_run.get_config(f"{data},survival,steps=4,log_every=2,checkpoint_every=2")
    config.stages = config.stages[:1]
    return config
