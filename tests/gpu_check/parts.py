"""The parts of the check, and what a part's process shares with the others."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """What is known when a part begins. device: the figures of the first part."""

    dry_run: bool
    device: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One process of the check.

    Attributes:
      command: its arguments behind `python -m`. seconds: its time limit, where so much is left. log: file in the
      output folder. note: what a reader of its figures has to know.
    """

    name: str
    title: str
    command: Callable[[Context], list[str]]
    seconds: float
    log: str
    note: Callable[[Context], str] = lambda _: ""


def _own(name: str) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        return [f"gpu_check.{name}", "--device", json.dumps(context.device), *["--dry_run"] * context.dry_run]

    return command


TINY = {
    "vision": {"image_size": 56, "patch_size": 14, "width": 32, "mlp_dim": 64, "layers": 2, "heads": 2},
    "llm": {"vocab_size": 500, "width": 64, "mlp_dim": 128, "layers": 2, "heads": 2, "kv_heads": 2},
    "exchange": {"layers": 1, "heads": 2},
}
# What of FLARE-L 3B fits a card of 80 GB: half of the layers. Parameters, their gradients and Adam's moments take 16
# bytes a parameter, and 5.8 billion take 93 GB.
HALF = ["--config.model.llm.layers=14", "--config.model.exchange.layers=5", "--config.model.vision.layers=20"]
WHOLE_FROM = 100e9  # bytes of memory


def whole(context: Context) -> bool:
    """Whether the card holds the whole 3B model in training."""
    return context.device.get("memory_gb", 0) * 1e9 >= WHOLE_FROM


def _step(large: bool) -> Callable[[Context], list[str]]:
    def command(context: Context) -> list[str]:
        flags = ["fusion_jax.benchmark", "step", "--trace", "--config"]
        if context.dry_run:
            flags.append("configs/flare.py:l_8b,stage1")  # the rope of l_3b is for heads of 96
            tiny = [
                f"--config.model.{part}.{key}={value}" for part, keys in TINY.items() for key, value in keys.items()
            ]
            flags += [
                *tiny,
                "--config.model.latent_counts=(1,4)",
                "--config.stages[0].max_length=512",
                "--config.remat=none",
            ]
            return [*flags, "--config.stages[0].batch_size=4", "--latents", "4" if large else "1"]
        flags.append("configs/flare.py:l_3b,stage1")
        flags += ["--config.stages[0].max_question_length=128", "--config.stages[0].batch_size=32"]
        flags += ["--config.stages[0].accumulation=4"]
        # On the whole model the compiler plans 70 GB of temporaries with `dots`, beside 70 GB of state.
        flags += ["--config.remat=full"] if whole(context) else HALF
        return [*flags, "--latents", "144" if large else "4"]

    return command


def _said(context: Context) -> str:
    fits = (
        "the whole model, remat full"
        if whole(context)
        else "half of the layers (decoder, exchange and encoder), remat dots"
    )
    return (
        f"On this card: {fits}; 32 samples in 4 microbatches, or in more where that does not fit (`accumulation`). "
        "MFU: model FLOPs (a multiply-add is 2, causal attention half, no padding, nothing computed again) over the "
        "dense bfloat16 peak of the card's datasheet. Shares of operations are of the traced steps' span."
    )


DEVICE = Part("device", "Device", _own("device"), 75, "device.log")
# In this order, by worth; those of one group at the same time, where nothing is timed.
GROUPS = (
    (DEVICE,),
    (Part("kernels", "Attention kernels", _own("kernels"), 150, "kernels.log"),),
    (Part("step_large", "Step, FLARE-L 3B stage 1, largest l²", _step(True), 270, "step.log", _said),),
    (
        Part("goldens", "Goldens", _own("goldens"), 150, "goldens.log"),
        Part("training", "Training run beside the CPU's", _own("training"), 150, "training.log"),
    ),
    (Part("generation", "Prefill and decode, 3B", _own("generation"), 170, "generation.log"),),
    (Part("step_small", "Step, FLARE-L 3B stage 1, smallest l²", _step(False), 220, "step.log", _said),),
)


def arguments() -> Context:
    """Of a part's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=json.loads, default={})
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    return Context(options.dry_run, options.device)


def say(figures: dict, failures: list[str]) -> None:
    """The part's result so far: the last line counts, also of a process that is cut."""
    print(json.dumps({**figures, "failures": failures}), flush=True)


def note(*words) -> None:
    """For the log."""
    print(*words, file=sys.stderr, flush=True)
