#!/usr/bin/env bash
# The long proofs of survival, with real runs that are killed, stopped and damaged; writes docs/soak.md.
# The argument scales the number of kills: bash launch/soak.sh 0.25 makes five of the twenty.
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=. python tests/soak.py --folder "$folder" --report docs/soak.md --scale "${1:-1}"
