#!/usr/bin/env bash
# Trains on this machine as the other launch scripts do: with environment, compiler flags and restarts.
usage() {
  cat <<'TEXT'
bash launch/train.sh [--flags KIND] [--once] [--pid_file FILE] [--dry_run] -- --config FILE --workdir DIR ...

  --flags KIND       compiler flags of launch/xla_flags.sh (default: auto)
  --once             do not restart: SLURM and Kubernetes do that themselves
  --codes LIST       exit codes that mean "run me again" (default: 75; see launch/restart.sh)
  --pid_file FILE    file for the process id of the restart loop; on SIGTERM to it training saves and ends

Everything after -- goes to `python -m fusion_jax.train`. EXTRAS (tpu, gpu) names the extras of setup.py to install.
TEXT
}
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/lib.sh"
flags=auto once='' codes=75 pid_file=''
options "--flags --codes --pid_file" "--once" "$@"
[ ${#REST[@]} -eq 0 ] || die "unexpected argument '${REST[0]}'; training's own flags follow --."
[ ${#AFTER[@]} -gt 0 ] || die "no flags for training; give --config and --workdir after --."
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
