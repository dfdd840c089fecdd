#!/usr/bin/env bash
# Lint, formatting and all tests, in the same environment as the quickstart plus the test extras.
# Two processes share the test files, because most of a test's time is tracing, which uses one core.
# Arguments go to pytest: bash launch/test.sh -k attention
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15 "$@"
