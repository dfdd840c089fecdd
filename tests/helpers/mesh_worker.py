"""Trains two steps on every mesh of CASES over 8 CPU devices and writes what came out; run by test_sharding.py.

Needs eight devices: see the fixture there.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from helpers.fixtures import QUESTION_LENGTH, example, flat, lay, randomise, tiny

from fusion_jax.config import MeshConfig, StageConfig
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.devices import sharding
from fusion_jax.models.fusion import Fusion
from fusion_jax.planning.report import axes_of
from fusion_jax.planning.work import read
from fusion_jax.training import optim, state
from fusion_jax.training.step import compile_step

# Sizes that 8 devices divide, and rows of 37 positions, a number that no parameter has.
SIZES = {
    "vision.width": 32, "vision.mlp_dim": 48, "vision.heads": 8, "vision.layers": 2, "exchange.heads": 8,
    "llm.layers": 1, "exchange.layers": 1, "llm.width": 64, "llm.mlp_dim": 80, "llm.heads": 8, "llm.kv_heads": 8,
}  # fmt: skip
ROWS, LENGTH, LONG = 16, 37, 131

# name: (data, fsdp, tensor), accumulation, batch, preset, fields of the stage
CASES = {
    "one": ((1, 1, 1), 1, "mixed", "paper", {}),
    "data": ((8, 1, 1), 1, "mixed", "paper", {}),
    "fsdp": ((1, 8, 1), 1, "mixed", "paper", {}),
    "tensor": ((1, 1, 8), 1, "mixed", "paper", {}),
    "mixed": ((2, 2, 2), 2, "mixed", "paper", {}),
    "copies": ((2, 4, 1), 2, "mixed", "paper", {"gather": "step"}),
    "copies, narrow sums": ((2, 4, 1), 2, "mixed", "paper", {"gradient_sums": "bfloat16"}),
    "one, released": ((1, 1, 1), 1, "packed", "released", {}),
    "mixed, released": ((2, 2, 2), 2, "packed", "released", {}),
    "one, muon": ((1, 1, 1), 1, "mixed", "paper", {"optimizer": "muon"}),
    "fsdp, muon": ((1, 8, 1), 1, "mixed", "paper", {"optimizer": "muon"}),
    "mixed, muon": ((2, 2, 2), 2, "mixed", "paper", {"optimizer": "muon"}),
}


def batch_of(kind, config):
    def one(seed):
        image = seed % 4 != 2
        return example(config, seed, image=image, rounds=1 + seed % 2, question=3, answer=1 + seed % 5)

    if kind == "mixed":
        return lay(config, [one(seed) for seed in range(ROWS)], length=LENGTH)
    # Long enough for the CPU's own attention kernel; two rows share the crops of their four conversations.
    spec = dataclasses.replace(layout_spec(config, LONG, QUESTION_LENGTH, 4, 2), crops=4)
    rows = [[one(2 * row), one(2 * row + 1)] for row in range(ROWS)]
    return lay_out_rows(rows, spec, config.latent_counts[0], groups=ROWS // 2)


def collectives(hlo: str):
    """[kind, [shapes of the results]] of every collective of a compiled program."""
    matches = re.findall(
        r"= (\S.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo
    )
    return [[kind, re.findall(r"\[([\d,]*)\]", shapes)] for shapes, kind in matches]


def sent(hlo: str, mesh) -> dict[str, list[float]]:
    """Bytes that a device sends in a step, and how many collectives it runs, by their kind and mesh axes."""
    sums = {}
    for one in read(hlo, mesh.size).collectives:
        of_kind = sums.setdefault(f"{one.kind} {axes_of(one.groups, mesh)}", [0.0, 0.0])
        of_kind[0] += one.bytes * one.times
        of_kind[1] += one.times
    return sums


def main(arrays_file: str, report_file: str):
    arrays, report = {}, {}
    for name, (sizes, accumulation, kind, preset, fields) in CASES.items():
        config = tiny(preset, **SIZES)
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        stage = StageConfig(
            "s", "d.json", batch_size=ROWS, accumulation=accumulation, learning_rate=1e-2, b2=0.9, eps=1e-4, **fields
        )
        if name in ("one", "mixed"):
            initial = state.initial_parameters(config, 0, mesh)
            arrays |= {f"{name}|init|{path}": leaf for path, leaf in flat(initial).items()}
        abstract = state.abstract_parameters(config, mesh)
        params = jax.device_put(randomise(abstract), jax.tree.map(lambda x: x.sharding, abstract))
        tx, labels = optim.optimizer(stage, params), optim.labels(stage, params)
        current = state.begin(params, tx, mesh)
        batch = sharding.put_batch(batch_of(kind, config), mesh)
        step = compile_step(Fusion(config, remat="attention"), stage, tx, labels, mesh)
        lowered = step.lower(current, batch, optim.learning_rates(stage, 5, 10))
        compiled = lowered.compile()
        largest = max(jax.tree.leaves(current.params), key=lambda x: x.size)
        report[name] = {
            "constraints": lowered.as_text().count("sdy.sharding_constraint"),
            "manual": lowered.as_text().count("sdy.manual_computation"),
            "collectives": collectives(compiled.as_text()),
            "sent": sent(compiled.as_text(), mesh),
            "losses": [],
            "largest": largest.size,
            "parameters_here": sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(current.params)),
            "state": sum(x.size for x in jax.tree.leaves(current)),
            "state_here": sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(current)),
        }
        for i in range(2):
            current, metrics = compiled(current, batch, optim.learning_rates(stage, 5 + i, 10))
            report[name]["losses"].append({key: float(value) for key, value in metrics.items()})
        arrays |= {f"{name}|after|{path}": leaf for path, leaf in flat(current.params).items()}
        moments = current.opt_state[1].inner_state[0]  # the mean of both steps' clipped gradients, times 1 - b1
        arrays |= {f"{name}|mu|{path}": leaf for path, leaf in flat(moments.mu).items()}
        assert all(
            x.sharding == p.sharding for x, p in zip(jax.tree.leaves(moments.mu), jax.tree.leaves(current.params))
        )
    np.savez(arrays_file, **arrays)
    Path(report_file).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
