"""`fusion_jax.train` on a mesh whose neighbours belong to different processes, as on TPU slices of several hosts.

Of every batch of prompts it prints the answers, and a number for each row's logits: tiny models answer all alike.
"""

import json

import numpy as np
from jax.experimental import mesh_utils

from fusion_jax import train
from fusion_jax.command_line.cli import run_main
from fusion_jax.devices import distributed
from fusion_jax.inference import decoding, generate


def interleaved(sizes, devices, **_):
    """The devices 0 1 2 3 as 0 2 1 3."""
    return np.array(devices, object).reshape(2, -1).T.reshape(sizes)


def answered(self, prompts, *arguments, answer=generate.Answerer.answer):
    answers = answer(self, prompts, *arguments)
    print("answers", json.dumps([[prompt.where, answer] for prompt, answer in zip(prompts, answers, strict=True)]))
    return answers


def begun(logits, *arguments, begin=decoding.begin):
    weights = np.random.default_rng(0).standard_normal(logits.shape[1])
    print("logits", json.dumps((distributed.whole(logits) @ weights).tolist()))
    return begin(logits, *arguments)


if __name__ == "__main__":
    mesh_utils.create_device_mesh = interleaved
    generate.Answerer.answer, decoding.begin = answered, begun
    train.define_flags()
    run_main(train.main)
