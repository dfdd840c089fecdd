"""Prefill and decode of the 3B model, one prompt and 32 at once, beside what reading the weights takes."""

import math

import jax
import jax.numpy as jnp
from gpu_check.parts import arguments, note, say

from fusion_jax.benchmarking import generation
from fusion_jax.models import fusion
from fusion_jax.models.config import VARIANTS

QUESTION, ANSWER = 64, 64  # tokens


def weight_bytes(params) -> int:
    """Of what one decoded token reads: the decoder without the table of embeddings."""
    read = {name: part for name, part in params["llm"].items() if name != "embedding"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def main() -> None:
    context = arguments()
    config = VARIANTS["flare_l"]["3b"]
    if context.dry_run:
        from helpers import fixtures

        config = fixtures.tiny("paper")
    model = fusion.Fusion(config, jnp.bfloat16)
    params = jax.block_until_ready(generation.random_params(model))
    bandwidth = context.device.get("copy_gb_per_second", math.nan) * 1e9
    floor = 1e3 * weight_bytes(params) / bandwidth
    figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "question_tokens": QUESTION,
        "answer_tokens": ANSWER,
        "floor_ms_a_token_bfloat16_weights": floor,
        "prefill": [],
        "decode": [],
    }
    failures = []
    for rows in (1, 2) if context.dry_run else (1, 32):
        timed = generation.time_prefill(model, params, rows, QUESTION, ANSWER, 3)
        figures["prefill"].append(
            {
                "rows": rows,
                "positions": timed["length"],
                "ms": 1e3 * timed["seconds"],
                "compile_s": timed["compile_seconds"],
            }
        )
        say(figures, ["decode was not timed"])
        timed = generation.time_decode(model, params, rows, QUESTION, ANSWER, 3)
        ms = 1e3 * timed["seconds"] / (ANSWER - 1)
        figures["decode"].append(
            {
                "rows": rows,
                "tokens_per_second": timed["tokens_per_second"],
                "ms_a_token": ms,
                "times_the_bfloat16_floor": ms / floor,
            }
        )
        note(figures["prefill"][-1], figures["decode"][-1])
        if not timed["tokens_per_second"] > 0:
            failures.append(f"{rows} rows: {timed['tokens_per_second']} tokens a second")
        say(figures, failures)


if __name__ == "__main__":
    main()
