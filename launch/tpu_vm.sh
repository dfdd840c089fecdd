#!/usr/bin/env bash
# Manages a TPU VM, or a pod of them, from request to deletion, by queued resources.
usage() {
  cat <<'TEXT'
bash launch/tpu_vm.sh COMMAND NAME --zone ZONE [options] [--dry_run]

In this order:
  create    requests the chips: --type v5litepod-16, v5p-256, v6e-8, ... (the name counts cores on v4 and v5p: v5p-256
            is 128 chips); [--slices N] [--spot] [--reserved] [--runtime IMAGE] [--valid_until 6h]
  wait      waits until they are ready [--every 60]; reports if the request failed
  install   copies this checkout (its committed files) to all hosts and makes its environment
  mount     mounts a bucket as the folder /mnt/BUCKET of all hosts: --bucket BUCKET
  push      copies a file or folder to all hosts: push NAME --from weights/start --to weights  (relative to the checkout)
  doctor    runs python -m fusion_jax.doctor on all hosts: doctor NAME [-- --config FILE --workdir DIR]
  run       starts training on all hosts in the background, with launch/train.sh's restarts:
            run NAME -- --config FILE --workdir DIR ...   [--flags v5p; default: by the machine]
  logs      prints the log of one host so far [--host 0]; --follow continues with it
  stop      sends SIGTERM to the restart loops: training saves and ends
  fetch     copies a folder from host 0: fetch NAME --from runs/x --to runs
  delete    gives the chips back; the disks and everything on them are lost
  keep      does create, wait, install, mount and run, and repeats them whenever the chips are taken away (--spot), until
            training has ended: keep NAME --type ... --bucket BUCKET -- --config FILE --workdir /mnt/BUCKET/run
and any time:
  status    prints the state of the request

All commands take [--project PROJECT]. On a pod, --workdir and the data must be visible to all hosts: in a mounted bucket
(/mnt/BUCKET/...) or another share (/...).
TEXT
}
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

zone='' project='' type='' slices=1 spot='' reserved='' runtime='' valid_until='' every=60 flags=auto host=0 follow='' from='' to='' bucket=''
options "--zone --project --type --slices --runtime --valid_until --every --flags --host --from --to --bucket" "--spot --reserved --follow" "$@"
[ ${#REST[@]} -gt 0 ] || { usage >&2; die "give a command."; }
command=${REST[0]}
[[ " create wait install mount push doctor run logs stop fetch delete keep status " == *" $command "* ]] ||
  die "unknown command '$command'; known: create, wait, install, mount, push, doctor, run, logs, stop, fetch, delete, keep, status."
[ ${#REST[@]} -eq 2 ] || die "give COMMAND and NAME, got: ${REST[*]}."
name=${REST[1]}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "NAME must be small letters, digits and dashes, got '$name'."
[ -n "$zone" ] || die "give --zone, for example --zone us-east5-a."
number --slices slices
number --every every
number --host host
[[ -z $bucket || $bucket =~ ^[a-z0-9][-_.a-z0-9]+$ ]] || die "--bucket is the name alone, without gs://, got '$bucket'."
need gcloud "see https://cloud.google.com/sdk/docs/install."

resource=(gcloud compute tpus queued-resources)
place=(--zone "$zone" ${project:+--project "$project"})
training=("${AFTER[@]}")

# On the hosts the checkout is in ~/fusion_jax, and all files of a run are in ~/fusion_jax/runs.
everywhere() { # COMMAND: on all hosts of all slices at once
  run "${resource[@]}" ssh "$name" "${place[@]}" --node all --worker all --command "$1"
}

on_host() { # NUMBER COMMAND: on one host of the first slice
  run "${resource[@]}" ssh "$name" "${place[@]}" --node 0 --worker "$1" --command "$2"
}

check_type() {
  [[ $type =~ ^(v4|v5litepod|v5p|v6e)-[0-9]+$ ]] || die "--type must be like v4-8, v5litepod-16, v5p-256 or v6e-8, got '$type'."
  if [ -z "$runtime" ]; then
    case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    esac
  fi
  [ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved exclude each other."
  ((slices >= 1)) || die "--slices must be at least 1."
}

# Hosts of a pod do not see each other's disks. One host holds up to 8 chips (v5e, v6e) or 4 (v4, v5p: 8 cores).
check_training() {
  local i workdir='' config=''
  for ((i = 0; i < ${#training[@]}; i++)); do
    case ${training[i]} in
    --workdir=*) workdir=${training[i]#*=} ;;
    --workdir) workdir=${training[i + 1]:-} ;;
    --config=*) config=${training[i]#*=} ;;
    --config) config=${training[i + 1]:-} ;;
    esac
  done
  [ -n "$config" ] && [ -n "$workdir" ] || die "give training's flags after --, with --config FILE and --workdir DIR."
  [[ $workdir != *://* ]] || die "--workdir=$workdir must be a folder; mount the bucket (--bucket) and give /mnt/BUCKET/..."
  if [ -n "$type" ] && { ((${type##*-} > 8)) || ((slices > 1)); } && [[ $workdir != /* ]]; then
    die "--workdir=$workdir would be another folder on every host of $type; give one in a mounted bucket or share (/...)."
  fi
}

create() {
  local nodes=(--node-id "$name")
  ((slices == 1)) || nodes=(--node-count "$slices" --node-prefix "$name")
  run "${resource[@]}" create "$name" "${place[@]}" --accelerator-type "$type" --runtime-version "$runtime" "${nodes[@]}" \
    ${spot:+--spot} ${reserved:+--reserved} ${valid_until:+--valid-until-duration "$valid_until"}
}

state() { run "${resource[@]}" describe "$name" "${place[@]}" --format "value(state.state)"; }

wait_for() {
  local now
  if [ -n "${DRY_RUN:-}" ]; then
    state
    echo "# again every $every s until it says ACTIVE; ends with an error at FAILED, SUSPENDING or SUSPENDED"
    return
  fi
  while :; do
    now=$(state) || return 1
    case $now in
    ACTIVE) return 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      echo "error: the request is $now; 'gcloud compute tpus queued-resources describe $name' says why." >&2
      return 1
      ;;
    esac
    echo "$(date +%H:%M:%S)  $name: $now"
    sleep "$every"
  done
}

install() {
  local archive=/tmp/fusion_jax-$name.tar.gz
  [ -z "$(git -C "$root" status --porcelain)" ] || echo "note: uncommitted changes are not copied" >&2
  run git -C "$root" archive --format tar.gz --prefix fusion_jax/ --output "$archive" HEAD &&
    run "${resource[@]}" scp "$archive" "$name:fusion_jax.tar.gz" "${place[@]}" --node all --worker all &&
    everywhere "tar xzf fusion_jax.tar.gz && bash fusion_jax/launch/host.sh install --extras tpu"
}

mount_bucket() { everywhere "bash fusion_jax/launch/host.sh mount --bucket $bucket"; }

start() {
  # When one host of a pod is lost, it ends by a signal (137, 139) and the others by JAX's abort (134): all start again.
  everywhere "$(shown bash fusion_jax/launch/host.sh start --extras tpu --flags "$flags" --codes 75,134,137,139 -- "${training[@]}")"
}

prepare() { install && { [ -z "$bucket" ] || mount_bucket; } && start; }

# Watches training until it has ended (its exit code) or the hosts are gone (100).
watch() {
  local answer silent=0
  while ((silent < 3)); do # a host that does not answer once may only be busy
    sleep "$every"
    [ "$(state)" = ACTIVE ] || return 100
    if answer=$(on_host 0 "bash fusion_jax/launch/host.sh state"); then silent=0; else silent=$((silent + 1)); fi
    if [[ $answer == *"ended with exit code "* ]]; then
      echo "$answer"
      return "${answer##*exit code }"
    fi
  done
  return 100
}

keep() {
  local code
  if [ -n "${DRY_RUN:-}" ]; then
    create && wait_for && prepare
    echo "# then, every $every s: has training ended? When the chips were taken away: delete, and all of this again"
    return
  fi
  while :; do
    state >/dev/null 2>&1 || create || return
    if wait_for; then
      if prepare; then
        watch
        code=$?
        [ "$code" -eq 100 ] || return "$code"
      elif [ "$(state)" = ACTIVE ]; then
        die "the hosts are ready but cannot be set up (see above); repair that and run this again, or delete $name."
      fi
    fi
    echo "$(date +%H:%M:%S)  $name was lost; requesting it again"
    "${resource[@]}" delete "$name" "${place[@]}" --force --quiet
    sleep "$every"
  done
}

case $command in
create | keep) check_type ;;&
run | keep) check_training ;;&
mount) [ -n "$bucket" ] || die "mount needs --bucket." ;;&
push | fetch) [ -n "$from" ] && [ -n "$to" ] || die "$command needs --from and --to." ;;&
create) create ;;
wait) wait_for ;;
install) install ;;
mount) mount_bucket ;;
push)
  [ -e "$from" ] || die "$from does not exist."
  everywhere "mkdir -p $(quoted "fusion_jax/$to")" &&
    run "${resource[@]}" scp "$from" "$name:fusion_jax/$to/" "${place[@]}" --node all --worker all --recurse
  ;;
doctor)
  everywhere "$(shown bash fusion_jax/launch/host.sh doctor --extras tpu --flags "$flags" ${AFTER[@]:+-- "${AFTER[@]}"})"
  ;;
run) start ;;
logs) on_host "$host" "bash fusion_jax/launch/host.sh log${follow:+ --follow}" ;;
stop) everywhere "bash fusion_jax/launch/host.sh stop" ;;
fetch)
  run mkdir -p "$to" &&
    run "${resource[@]}" scp "$name:fusion_jax/$from" "$to/" "${place[@]}" --node 0 --worker 0 --recurse
  ;;
delete) run "${resource[@]}" delete "$name" "${place[@]}" --force --quiet ;;
status) state ;;
keep) keep ;;
esac
