#!/usr/bin/env bash
# Whether this checkout computes rightly and fast on this machine's GPU, in one command and a few minutes.
usage() {
  cat <<'TEXT'
bash launch/gpu_check.sh [--minutes 9] [--out DIR] [--parts LIST] [--dry_run]

  --minutes N     time for everything; each part has its own limit within it (default: 9)
  --out DIR       report.md, report.json and the parts' logs (default: runs/gpu_check)
  --parts LIST    only these, with commas between: kernels, step_large, goldens, training, generation, step_small
  --dry_run       on the CPU, at tiny shapes: whether the check itself runs through

Needs one NVIDIA GPU and a Python (PYTHON, else .venv, else python3) with what requirements.txt and jax[cuda13] install;
what is missing is named first. The report is written after each part and survives a cut. Exit code: 0 all parts
passed, 1 not all, 2 the check could not begin.
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
# Alone on the card, a run may take more of it than beside whatever else a training node has.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}
exports=$(bash launch/xla_flags.sh "$kind")
eval "$exports"
PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m gpu_check --out "$out" --minutes "$minutes" \
  --parts "$parts" ${DRY_RUN:+--dry_run}
