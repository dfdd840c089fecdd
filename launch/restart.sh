#!/usr/bin/env bash
# Runs a command again as often as its exit code requests it. It needs only bash, and works inside containers.
usage() {
  cat <<'TEXT'
bash launch/restart.sh [options] -- COMMAND ...

Runs COMMAND, and starts it again when it ends with an exit code that means "run me again". Training ends with 75 after it
has saved on SIGTERM or on a preemption notice. After a failure (exit code 1, or above 128: killed by a signal, for example
for lack of memory) COMMAND is started again a few times. In every other case (2 is a mistake that somebody has to correct)
this script ends with COMMAND's exit code.

  --codes LIST        exit codes that mean "run me again" (default: 75)
  --fast SECONDS      a run shorter than this did no work (default: 60)
  --max_fast N        after N fast runs in a row this script ends with exit code 1 (default: 3)
  --pause SECONDS     wait before a new run (default: 5); two, four, ... times as long after failures in a row
  --retries N         start again after up to N failures in a row (default: 3)
  --long SECONDS      a run of at least this length made progress: failures before it no longer count (default: 3600)
  --pid_file FILE     file for the process id of this script, removed when it ends
  --dry_run           print what would be run

SIGTERM, SIGHUP or Ctrl-C reaches COMMAND as SIGTERM. Its exit code is then passed on and it is not started again, so that
SLURM, Kubernetes or whatever else started this script decides. A second Ctrl-C kills COMMAND.
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

codes=75 fast=60 max_fast=3 pause=5 retries=3 long=3600 pid_file=
options "--codes --fast --max_fast --pause --retries --long --pid_file" "" "$@"
[ ${#REST[@]} -eq 0 ] || die "unexpected argument '${REST[0]}'; the command follows --."
[ ${#AFTER[@]} -gt 0 ] || die "no command; give it after --, for example: restart.sh -- python -m fusion_jax.train ..."
[[ $codes =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--codes must be exit codes with commas between, got '$codes'."
for name in fast max_fast pause retries long; do number "--$name" "$name"; done

if [ -n "${DRY_RUN:-}" ]; then
  shown "${AFTER[@]}"
  echo "# again on exit code $codes, ${pause} s later; ended by $max_fast runs in a row shorter than $fast s"
  echo "# again on exit code 1 or above 128 (not 130), at most $retries times in a row"
  exit 0
fi

child='' stopped='' interrupted=''
stop() { # signal that arrived
  interrupted=1
  if [ -n "$child" ]; then
    if [ "$1" = INT ] && [ -n "$stopped" ]; then kill -KILL "$child"; else kill -TERM "$child"; fi 2>/dev/null
  fi
  stopped=1
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop HUP' HUP
if [ -n "$pid_file" ]; then
  echo $$ >"$pid_file" || die "cannot write $pid_file."
  trap 'rm -f "$pid_file"' EXIT
fi

# Whether an exit code is a failure that may not happen again. 130 is Ctrl-C, which somebody pressed on purpose.
failed() { (($1 == 1 || ($1 > 128 && $1 != 130))); }

fast_runs=0 failures=0
while :; do
  started=$SECONDS
  "${AFTER[@]}" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null # the signal came before there was a child to pass it to
  while :; do # a signal ends `wait` early: only a wait without one returns the child's exit code
    interrupted=
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || break
  done
  child=
  took=$((SECONDS - started)) wait_for=$pause
  [ -z "$stopped" ] || exit "$code"
  if [[ ",$codes," == *",$code,"* ]]; then
    if ((took < fast)); then fast_runs=$((fast_runs + 1)); else fast_runs=0 failures=0; fi
    if ((fast_runs >= max_fast)); then
      echo "restart: $fast_runs runs in a row ended with exit code $code in under $fast s; giving up." >&2
      exit 1
    fi
  elif failed "$code"; then
    if ((took >= long)); then failures=0; fi
    failures=$((failures + 1)) fast_runs=0
    if ((failures > retries)); then
      echo "restart: exit code $code after $took s, failure $failures in a row; giving up." >&2
      exit "$code"
    fi
    wait_for=$((pause << (failures < 16 ? failures : 16)))
  else
    exit "$code"
  fi
  echo "restart: exit code $code after $took s; again in $wait_for s" >&2
  # One second at a time, because bash handles a signal only after the running command has ended.
  for ((waited = 0; waited < wait_for; waited++)); do
    [ -z "$stopped" ] || exit "$code"
    sleep 1
  done
  [ -z "$stopped" ] || exit "$code"
done
