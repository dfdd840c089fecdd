"""Tensors of the published PyTorch system: weights, inputs and outputs of a few small models, for comparison."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.data.layout import Example, LayoutSpec, lay_out
from fusion_jax.interop import importing
from fusion_jax.models.config import QUADRANTS
from fusion_jax.models.fusion import Fusion

GOLDENS = Path(os.environ.get("FUSION_GOLDENS", Path(__file__).parents[2] / ".." / "shared" / "goldens" / "models"))
CASES = sorted(p.parent.name for p in GOLDENS.glob("*/case.json"))
needs_goldens = pytest.mark.skipif(not CASES, reason=f"no golden cases under {GOLDENS} (set FUSION_GOLDENS)")
MASKS = {"io_released": "released", "io_paper_mask": "paper"}


@functools.cache
def load_weights(case):
    return importing.load(GOLDENS / case / "hf")


@dataclasses.dataclass
class Golden:
    config: object
    model: Fusion
    params: dict
    batch: object
    io: dict


@functools.cache
def load(case, file):
    config, params = load_weights(case)
    config = dataclasses.replace(config, mask=MASKS[file])
    io = dict(np.load(GOLDENS / case / f"{file}.npz"))
    crops = io["images_uint8_48"].repeat(8, axis=3).repeat(8, axis=4).transpose(0, 1, 3, 4, 2)
    examples = []
    for row in range(len(crops)):
        real = io["attention_mask"][row].astype(bool)
        zero = io["image_is_zero"][row]
        question = io["instructs"][row].astype(np.int32)
        examples.append(
            Example(
                input_ids=io["input_ids"][row][real].astype(np.int32),
                labels=io["labels"][row][real].astype(np.int32),
                question_ids=question[:0] if zero else question,
                crops=None if zero else crops[row],
                where=f"{case} row {row}",
            )
        )
    spec = layout_spec(config, io["out_logits"].shape[1], io["instructs"].shape[1], io["out_instruct_pos"].shape[1])
    batch = jax.tree.map(jnp.asarray, lay_out(examples, spec, config.latent_counts[0]))
    return Golden(config, Fusion(config), params, batch, io)


def layout_spec(config, length, question_length, rounds):
    return LayoutSpec(
        length=length,
        question_length=question_length,
        rounds=rounds,
        image_tokens=config.tokens_per_image,
        image_size=config.vision.image_size,
        quadrants=QUADRANTS,
        zero_image_for_text=True,
        hide_question_id_zero=config.hide_question_id_zero,
    )
