#!/usr/bin/env bash
# The long proofs: survival, with real runs that are killed, stopped and damaged, which writes docs/soak.md; and the
# memory of the input pipeline over 200,000 samples, which prints a line.
# The argument scales the number of kills: bash launch/soak.sh 0.25 makes five of the twenty.
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=. python tests/soak.py --folder "$folder" --report docs/soak.md --scale "${1:-1}"
PYTHONPATH=. python tests/soak_input.py
PYTHONPATH=. python tests/soak_resample.py
