"""The whole model on this device, float32 and bfloat16, against values computed elsewhere.

Two sources of such values: the tests' small model with weights that hide nothing, run on this machine's CPU in
float32; and the tensors of the published PyTorch system where they are at hand (FUSION_GOLDENS, see tests/parity).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from gpu_check.kernels import error
from gpu_check.parts import arguments, note, say
from helpers import fixtures

from fusion_jax.models import partition
from fusion_jax.models.fusion import Fusion
from fusion_jax.training.step import losses_of

# Largest difference of one value, float32, as in tests/parity; a gradient's norm by its relative error.
FLOAT32 = {"states": 1e-4, "logits": 2e-4, "losses": 1e-5, "worst_gradient": 1e-3}
BFLOAT16 = {"logits_relative": 0.03}


def model_config(preset: str, side: int):
    """The tests' tiny model with side x side patches and heads of 32 to 64, which the attention kernels take."""
    return fixtures.tiny(
        preset,
        **{"vision.image_size": 8 * side, "vision.width": 128, "vision.mlp_dim": 192, "vision.heads": 2},
        **{"llm.width": 128, "llm.mlp_dim": 192, "llm.heads": 4, "llm.kv_heads": 2, "llm.vocab_size": 192},
    )


def program(model: Fusion, options: dict | None = None):
    """Compiled (params, batch) -> (hidden, logits, losses, gradients by path)."""

    def forward(params, batch):
        hidden, visual, _ = model.apply({"params": params}, batch)
        logits = model.apply({"params": params}, hidden, method="logits")
        total, parts = losses_of(model, params, batch, hidden, visual)
        return total, (hidden, logits, {"total": total, **parts})

    def run(params, batch):
        grads, (hidden, logits, losses) = jax.grad(forward, has_aux=True)(params, batch)
        return hidden, logits, losses, flatten_dict(grads, sep="/")

    return jax.jit(run, compiler_options=options)


def values(config, params, batch, dtype, options: dict | None = None) -> tuple:
    # By default a GPU rounds float32 operands of a product to TF32.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        return jax.tree.map(lambda x: np.asarray(x, np.float32), program(Fusion(config, dtype), options)(params, batch))


def on_cpu(config, params, batch) -> tuple:
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), partition.compiled_for("cpu"):
        # It runs once: compiling with all optimisations takes longer.
        quick = {"xla_backend_optimization_level": 1}
        return values(config, *jax.device_put((params, batch), cpu), jnp.float32, quick)


def compare(got: tuple, wanted: tuple, real: np.ndarray) -> dict:
    """Largest differences at real positions, and relative errors."""
    (hidden, logits, losses, grads), (hidden0, logits0, losses0, grads0) = got, wanted
    largest = max(float(np.linalg.norm(g)) for g in grads0.values())
    # A key's bias has no gradient in exact arithmetic: what is there is rounding.
    judged = {path: g for path, g in grads0.items() if np.linalg.norm(g) > 1e-6 * largest}
    worst = max(judged, key=lambda path: _number(error(grads[path], judged[path])))
    return {
        "states": float(np.abs(hidden - hidden0)[real].max()),
        "logits": float(np.abs(logits - logits0)[real].max()),
        "logits_relative": error(logits[real], logits0[real]),
        "losses": max(abs(float(losses[name]) - float(losses0[name])) for name in losses0),
        "gradients_relative": error(_flat(grads, judged), _flat(grads0, judged)),
        "worst_gradient": error(grads[worst], judged[worst]),
        "worst_gradient_of": worst,
    }


def _flat(grads: dict, paths) -> np.ndarray:
    return np.concatenate([grads[path].ravel() for path in paths])


def _number(x: float) -> float:
    return x if x == x else float("inf")


def judge(row: dict, where: str) -> list[str]:
    limits = FLOAT32 if row["dtype"] == "float32" else BFLOAT16
    over = [f"{name} {row[name]:.2g} (limit {most:g})" for name, most in limits.items() if not row[name] <= most]
    return [f"{where}: {', '.join(over)}"] if over else []


def small_models(dry_run: bool):
    """(name, config, parameters, batch, wanted values) of the tests' model."""
    for preset in ("paper",) if dry_run else ("paper", "released"):
        config = model_config(preset, 12 if dry_run else 24)
        params = fixtures.params(config)
        examples = [
            fixtures.example(config, 0, answer=5),
            fixtures.example(config, 1, rounds=2, question=3),
            fixtures.example(config, 2, image=False, answer=2),
        ]
        batch = jax.tree.map(jnp.asarray, fixtures.lay(config, examples))
        yield f"small model, {preset}", config, params, batch, on_cpu(config, params, batch)


def published():
    """The same of the first published case, where its file is at hand. Its gradients are known by their norms alone."""
    from helpers import goldens

    for case in goldens.CASES[:1]:
        golden = goldens.load(case, "io_released")
        io = golden.io
        losses = {"total": io["out_loss"], "ce": io["out_ce"], "v2t": io["out_l_v2t"], "t2v": io["out_l_t2v"]}
        wanted = (io["out_hidden_final"], io["out_logits"], losses)
        yield f"published tensors, {case}", golden.config, golden.params, golden.batch, wanted


def main() -> None:
    context = arguments()
    rows, failures = [], []
    # Trying out kernels for every product took minutes on an H100, for programs that run once.
    untuned = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None

    def check(name, config, params, batch, wanted, real) -> None:
        for dtype in (jnp.float32, jnp.bfloat16):
            got = values(config, params, batch, dtype, untuned)
            if len(wanted) == 3:
                row = compare((*got[:3], {"": np.ones(1)}), (*wanted, {"": np.ones(1)}), real)
                row = {key: value for key, value in row.items() if "gradient" not in key} | {"worst_gradient": 0.0}
            else:
                row = compare(got, wanted, real)
            rows.append({"values": name, "dtype": jnp.dtype(dtype).name, **row})
            failures.extend(judge(rows[-1], f"{name}, {rows[-1]['dtype']}"))
            note(rows[-1])
            say({"limits_float32": FLOAT32, "limits_bfloat16": BFLOAT16, "models": rows}, failures)

    for name, config, params, batch, wanted in small_models(context.dry_run):
        check(name, config, params, batch, wanted, np.asarray(batch.segment_ids) > 0)
    if not context.dry_run:
        for name, config, params, batch, wanted in published():
            check(name, config, params, batch, wanted, np.asarray(batch.segment_ids) > 0)


if __name__ == "__main__":
    main()
