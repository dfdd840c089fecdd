#!/usr/bin/env bash
# Checks in a few minutes whether this checkout computes correctly on this machine's GPU, and how fast.
usage() {
  cat <<'TEXT'
bash launch/gpu_check.sh [--minutes 9] [--out DIR] [--parts LIST] [--dry_run]

  --minutes N     time for the whole check; each part has its own limit within it (default: 9)
  --out DIR       folder for report.md, report.json and the parts' logs (default: runs/gpu_check)
  --parts LIST    run only these parts, separated by commas: kernels, step_large, goldens, training, generation, step_small
  --dry_run       run at tiny shapes on the CPU, to see whether the check itself works

It needs one NVIDIA GPU and a Python (PYTHON, else .venv, else python3) with the packages of requirements.txt and
jax[cuda13]; missing ones are named first. The report is written after each part, so an interrupted check keeps its
finished parts. Exit code: 0 all parts passed, 1 not all passed, 2 the check could not start.
TEXT
}
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=9 out=runs/gpu_check parts=''
options "--minutes --out --parts" "" "$@"
[ ${#REST[@]} -eq 0 ] || die "unexpected argument '${REST[0]}'."
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--minutes must be a number, got '$minutes'."

python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
kind=gpu
[ -z "${DRY_RUN:-}" ] || kind=none
# Nothing else uses the card, so the check may take more of its memory than training on a node does.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}
exports=$(bash launch/xla_flags.sh "$kind")
eval "$exports"
PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m gpu_check --out "$out" --minutes "$minutes" \
  --parts "$parts" ${DRY_RUN:+--dry_run}
