"""Lowers what training runs beside its steps for two TPU chips that are not here; run by test_reports.py.

Needs two devices of any kind. Prints a JSON object: program, how many kernels of the TPU it holds.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers.fixtures import example, lay, tiny

from fusion_jax.config import MeshConfig
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.devices import sharding
from fusion_jax.inference import sampling
from fusion_jax.inference.decoding import begin, decode, prefill
from fusion_jax.models import partition
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import state
from fusion_jax.training.step import compile_evaluation

QUESTION = 150  # long rows: short ones take no kernel


def abstract(tree, mesh):
    """Shapes of a batch, or of anything else that is sharded like its rows."""
    rows = sharding.of_rows(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def main():
    config, mesh = tiny(), sharding.make_mesh(MeshConfig())
    model, params = Fusion(config, jnp.bfloat16), state.abstract_parameters(config, mesh)
    kernels = {}

    def lower(name, function, *arguments):
        with sharding.use(mesh), partition.compiled_for("tpu"):
            lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))
        kernels[name] = lowered.as_text().count("tpu_custom_call")
        return lowered.out_info

    spec = dataclasses.replace(layout_spec(config, 250, 6, 2), crops=2)
    # Three records, and an empty row to fill up.
    rows = [[example(config, seed, question=QUESTION)] for seed in range(3)] + [[]]
    batch = abstract(lay_out_rows(rows, spec, config.fixed_latent_count, groups=2), mesh)
    lower("validation", compile_evaluation(model, mesh).function, params, batch)

    prompts = lay(config, [example(config, seed, answer=0, question=QUESTION) for seed in range(2)])
    batch = abstract(prompts, mesh)
    limit, settings = np.array([8, 0], np.int32), sampling.settings([sampling.Sampling()] * 2)
    logits, positions, cache = lower("prefill", prefill, model, params, batch, 300, limit)
    begun = lower("begin", begin, logits, positions, cache, batch, limit, settings)
    for name, draw in (("decode", False), ("decode, drawn", True)):
        lower(name, decode, model, params, begun, 8, (2,), draw)
    json.dump(kernels, sys.stdout)


if __name__ == "__main__":
    main()
