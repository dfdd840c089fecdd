#!/usr/bin/env bash
# Lint, formatting and all tests, in the same environment as the quickstart plus the test extras.
# Arguments go to pytest: bash launch/test.sh -k attention
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
python -m pytest --durations=15 "$@"
