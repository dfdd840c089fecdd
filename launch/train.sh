#!/usr/bin/env bash
# Training on this machine as the other launch scripts start it: environment, compiler flags, restarts.
usage() {
  cat <<'TEXT'
bash launch/train.sh [--flags KIND] [--once] [--pid_file FILE] [--dry_run] -- --config FILE --workdir DIR ...

  --flags KIND       compiler flags of launch/xla_flags.sh (default: auto)
  --once             no restarts: SLURM and Kubernetes do that themselves
  --codes LIST       exit codes that mean "run me again" (default: 75; see launch/restart.sh)
  --pid_file FILE    holds the process id of the restart loop; SIGTERM to it saves and ends

Everything behind -- goes to `python -m fusion_jax.train`. EXTRAS (tpu, gpu) names the extras of setup.py to install.
TEXT
}
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/lib.sh"
flags=auto once='' codes=75 pid_file=''
options "--flags --codes --pid_file" "--once" "$@"
[ ${#REST[@]} -eq 0 ] || die "unexpected argument '${REST[0]}'; training's own flags stand behind --."
[ ${#AFTER[@]} -gt 0 ] || die "no flags for training; give --config and --workdir behind --."
exports=$(bash "$here/xla_flags.sh" "$flags") || exit

command=(python -m fusion_jax.train "${AFTER[@]}")
[ -n "$once" ] || command=(bash launch/restart.sh --codes "$codes" ${pid_file:+--pid_file "$pid_file"} -- "${command[@]}")
if [ -n "${DRY_RUN:-}" ]; then
  [ -z "$exports" ] || echo "$exports"
  shown "${command[@]}"
  exit 0
fi
source "$here/env.sh"
eval "$exports"
exec "${command[@]}"
