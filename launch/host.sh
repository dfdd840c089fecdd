#!/usr/bin/env bash
# Trains in the background of this machine and outlives the session that started it. launch/tpu_vm.sh calls it on every
# host; on your own machine you call it by hand.
usage() {
  cat <<'TEXT'
bash launch/host.sh COMMAND [options]

  install [--extras tpu]     installs Python 3.11 or 3.12 by uv where it is missing, and makes launch/env.sh's environment
  doctor [--extras tpu] [-- --config FILE --workdir DIR]
                             runs python -m fusion_jax.doctor with the compiler flags that training will get
  mount --bucket NAME [--at DIR]
                             mounts a Cloud Storage bucket as a folder (default: /mnt/NAME) by gcsfuse, which it installs on Debian and Ubuntu
  start [--flags KIND] [--codes LIST] -- --config FILE --workdir DIR ...
                             runs launch/train.sh in the background
  state                      prints: running, never started, cut off, or ended with exit code N
  log [--lines N] [--follow] prints its output
  stop [--wait SECONDS]      sends SIGTERM, on which training saves and ends, and waits for that (default: 300)

The log is runs/train.log of the checkout.
TEXT
}
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/lib.sh
source launch/lib.sh

extras=${EXTRAS:-} flags=auto codes=75 lines=200 follow='' wait=300 bucket='' at=''
options "--extras --flags --codes --lines --wait --bucket --at" "--follow" "$@"
[ ${#REST[@]} -eq 1 ] || { usage >&2; die "give one command."; }
number --lines lines
number --wait wait
export EXTRAS=$extras
# The process id of the restart loop, which takes SIGTERM, and that of the process around it, which starts before the
# environment is made and ends after the loop.
pid_file=runs/train.pid whole=runs/host.pid log=runs/train.log

alive() { [ -e "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

state() {
  if [ ! -e "$log" ]; then
    echo "never started"
  elif alive "$whole"; then
    echo running
  elif tail -n 1 "$log" | grep -q '^ended with exit code'; then
    tail -n 1 "$log"
  else
    echo "cut off, perhaps by a restart of the machine"
  fi
}

install() {
  local python
  python=$(command -v python3.12 || command -v python3.11)
  if [ -z "$python" ] && [ ! -x .venv/bin/python ]; then
    python3 -m pip install --user --quiet uv && "$HOME/.local/bin/uv" python install --quiet 3.12 || exit
    python=$("$HOME/.local/bin/uv" python find 3.12) || exit
  fi
  PYTHON=$python bash -c "source launch/env.sh"
}

mount_bucket() {
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  [ -n "$bucket" ] || die "give --bucket."
  at=${at:-/mnt/$bucket}
  if mountpoint -q "$at"; then
    echo "$at is mounted"
    return
  fi
  if [ -n "${DRY_RUN:-}" ] || ! command -v gcsfuse >/dev/null; then
    run sudo apt-get install --yes --quiet curl lsb-release &&
      run sudo curl -fsSL "$packages/doc/apt-key.gpg" --output "$key" &&
      run sudo bash -c "echo deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -c -s) main >/etc/apt/sources.list.d/gcsfuse.list" &&
      run sudo apt-get update --quiet && run sudo apt-get install --yes --quiet gcsfuse || exit
  fi
  run sudo mkdir -p "$at" && run sudo chown "$(id -u)" "$at" || exit
  # A checkpoint appears by renaming its folder: at once in a bucket with hierarchical namespace, one file after the other,
  # up to the limit, in others.
  run gcsfuse --implicit-dirs --rename-dir-limit 100000 "$bucket" "$at"
}

doctor() {
  local exports
  exports=$(bash launch/xla_flags.sh "$flags") || exit
  if [ -n "${DRY_RUN:-}" ]; then
    shown python -m fusion_jax.doctor "${AFTER[@]}"
    return
  fi
  # shellcheck source=launch/env.sh
  source launch/env.sh
  eval "$exports"
  exec python -m fusion_jax.doctor "${AFTER[@]}"
}

start() {
  local command=(bash launch/train.sh --flags "$flags" --codes "$codes" --pid_file "$pid_file" -- "${AFTER[@]}")
  if [ -n "${DRY_RUN:-}" ]; then
    shown "${command[@]}"
    return
  fi
  [ "$(state)" != running ] || die "training is running here already; stop it first (bash launch/host.sh stop)."
  mkdir -p runs
  echo "started $(date '+%Y-%m-%d %H:%M:%S'): $(shown "${command[@]}")" >>"$log"
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid bash -c '"$@"; echo "ended with exit code $?"' host "${command[@]}" >>"$log" 2>&1 </dev/null &
  echo $! >"$whole"
  echo "started; bash launch/host.sh log shows the output"
}

stop() {
  local left=$wait
  [ "$(state)" = running ] || die "nothing is running here: $(state)."
  # Before the loop has begun the environment is being made; there is nothing to save.
  if alive "$pid_file"; then run kill -TERM "$(cat "$pid_file")"; else run kill -TERM -- "-$(cat "$whole")"; fi
  [ -z "${DRY_RUN:-}" ] || return 0
  while [ "$(state)" = running ]; do
    ((left-- > 0)) || die "still running after $wait s; see bash launch/host.sh log."
    sleep 1
  done
  state
}

case ${REST[0]} in
install) install ;;
doctor) doctor ;;
mount) mount_bucket ;;
start) start ;;
state) state ;;
log)
  [ -e "$log" ] || die "no log yet: $(state)."
  tail -n "$lines" ${follow:+-f} "$log"
  ;;
stop) stop ;;
*) die "unknown command '${REST[0]}'; known: install, doctor, mount, start, state, log, stop." ;;
esac
