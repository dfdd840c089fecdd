"""Updates of a state in fewer bits, on one device and on meshes; run by test_rounding.py. Needs four devices.

Writes all arrays of the state after three updates on each mesh.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusion_jax.config import MeshConfig, StageConfig
from fusion_jax.devices import sharding
from fusion_jax.training import optim, state

MESHES = {"one": (1, 1, 1), "fsdp": (1, 4, 1), "mixed": (1, 2, 2)}
PLACES = {"layer": {"kernel": PartitionSpec(None, "fsdp", "tensor")}, "scale": PartitionSpec()}
PLACES["embedding"] = PartitionSpec("tensor", "fsdp")
STAGE = StageConfig("s", "d", first_moment="int8", second_moment="int8", master_weights="bfloat16", clip_norm=0.0)


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"layer": {"kernel": (3, 16, 24)}, "scale": (8,), "embedding": (32, 16)}
    return jax.tree.map(lambda s: rng.standard_normal(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def main(file: str):
    arrays = {}
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        places = jax.tree.map(lambda spec, mesh=mesh: NamedSharding(mesh, spec), PLACES)
        params = state.with_masters(jax.device_put(draw(0), places), STAGE.master_weights)
        tx, labels = optim.optimizer(STAGE, params), optim.labels(STAGE, params)

        def update(old, grads, tx=tx, labels=labels):
            squares = optim.squares(grads)
            updates, opt_state = tx.update(grads, old.opt_state, old.params, norm=optim.norm(squares), squares=squares)
            changes = optim.changes(updates, {optim.DEFAULT: 1e-2}, labels)
            params = optim.apply_changes(old.params, changes, labels, step=old.step)
            return state.TrainState(old.step + 1, params, opt_state, old.skipped, old.skipped_in_row)

        current = state.begin(params, tx, mesh)
        wanted = jax.tree.map(lambda x: x.sharding, current)
        step = jax.jit(update, out_shardings=wanted)
        for seed in (1, 2, 3):
            current = step(current, jax.device_put(draw(seed), places))
        if name == "mixed":  # codes lie where the weights do, scales along their rows
            codes, scale = current.opt_state[1].inner_state[0].mu["layer"]["kernel"]
            assert codes.addressable_shards[0].data.shape == (3, 8, 12)
            assert scale.addressable_shards[0].data.shape == (3, 8, 1)
        leaves = jax.tree.leaves_with_path((current.params, current.opt_state))
        arrays |= {f"{name}|{jax.tree_util.keystr(path)}": np.asarray(jnp.float32(x)) for path, x in leaves}
    np.savez(file, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
