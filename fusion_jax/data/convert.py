"""Runs `python -m fusion_jax.shards` under its former name, for one release."""

import runpy
import sys

if __name__ == "__main__":
    print("python -m fusion_jax.data.convert is now python -m fusion_jax.shards.", file=sys.stderr, flush=True)
    runpy.run_module("fusion_jax.shards", run_name="__main__", alter_sys=True)
