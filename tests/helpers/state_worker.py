"""Updates with moments of other shapes than their parameters, on one device and on meshes; run by test_sharding.py.

Needs four devices. Writes the results and the shardings of the moments on each mesh. Also loads a tower with more
layers than run.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
from helpers.fixtures import flat, randomise, tiny

from fusion_jax.config import MeshConfig
from fusion_jax.devices import sharding
from fusion_jax.training import state
from fusion_jax.training.loading import load_params

CONFIG = tiny(**{"vision.mlp_dim": 32, "llm.mlp_dim": 32, "vision.layers": 2, "llm.layers": 1, "exchange.layers": 1})
MESHES = {"one": (1, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 2), "mixed": (1, 2, 2)}
OPTIMIZERS = {
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "adafactor, masked": lambda: optax.masked(
        optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9), lambda p: {k: k != "llm" for k in p}
    ),
    "sm3": lambda: optax.sm3(1e-2),
}


def load_longer_tower(folder: Path):
    """A tower of all its layers, as in an import, becomes one of those that run, on each device its part."""
    config = tiny(**{"vision.layers": 5, "llm.layers": 1, "exchange.layers": 1})
    like = state.abstract_parameters(config, sharding.make_mesh(MeshConfig(1, 2, 2)))
    layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape[1:]), x.dtype), like["vision"]["layers"])
    stored = randomise({**like, "vision": {**like["vision"], "layers": layers}})
    ocp.save_checkpointables(folder, {"params": stored})
    loaded = load_params(folder, like)
    for x, wanted, kept in zip(*map(jax.tree.leaves, (loaded, like, stored)), strict=True):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype) and x.sharding == wanted.sharding
        np.testing.assert_array_equal(x, kept[: len(x)])


def main(arrays_file: str, report_file: str):
    arrays, report = {}, {}
    for mesh_name, sizes in MESHES.items():
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        abstract = state.abstract_parameters(CONFIG, mesh)
        places = jax.tree.map(lambda x: x.sharding, abstract)
        gradients = jax.device_put(randomise(abstract, seed=1), places)
        for name, make in OPTIMIZERS.items():
            tx = make()
            current = state.begin(jax.device_put(randomise(abstract), places), tx, mesh)
            wanted = jax.tree.map(lambda x: x.sharding, state.abstract(current.params, tx, mesh))

            def update(old, gradients, tx=tx):
                updates, opt_state = tx.update(gradients, old.opt_state, old.params)
                return state.TrainState(
                    old.step + 1, optax.apply_updates(old.params, updates), opt_state, old.skipped, old.skipped_in_row
                )

            step = jax.jit(update, in_shardings=(wanted, places), out_shardings=wanted, donate_argnums=0)
            for _ in range(2):
                current = step(current, gradients)
            case = f"{mesh_name}|{name}"
            moments = jax.tree.leaves_with_path(current.opt_state)
            arrays |= {f"{case}|params|{path}": leaf for path, leaf in flat(current.params).items()}
            arrays |= {f"{case}|moments|{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in moments}
            report[case] = {
                jax.tree_util.keystr(path): [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
                for path, leaf in moments
            }
            for leaf, place in zip(jax.tree.leaves(current), jax.tree.leaves(wanted), strict=True):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (case, leaf.sharding, place)
    load_longer_tower(Path(arrays_file).parent / "0")
    np.savez(arrays_file, **arrays)
    with open(report_file, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
