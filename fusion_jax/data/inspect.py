"""Runs `python -m fusion_jax.inspect` under its former name, for one release."""

import runpy
import sys

if __name__ == "__main__":
    print("python -m fusion_jax.data.inspect is now python -m fusion_jax.inspect.", file=sys.stderr, flush=True)
    runpy.run_module("fusion_jax.inspect", run_name="__main__", alter_sys=True)
