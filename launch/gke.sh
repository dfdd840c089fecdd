#!/usr/bin/env bash
# Trains on TPU slices in Google Kubernetes Engine, by XPK (pip install xpk; tested against 1.16).
usage() {
  cat <<'TEXT'
bash launch/gke.sh COMMAND [options] [--dry_run]

  image            builds and pushes launch/Dockerfile: --image us-docker.pkg.dev/PROJECT/REPOSITORY/fusion_jax:TAG
  cluster NAME     makes a cluster: --type v5p-256 --zone ZONE [--slices N] [--spot | --reservation R | --on_demand]
  storage NAME     makes a bucket the folder /mnt/NAME of workloads: --cluster NAME --bucket BUCKET
  run WORKLOAD     starts training: --cluster NAME --type v5p-256 --image IMAGE --storage NAME [--slices N] [--max_restarts 100]
                   [--priority medium] [--flags v5p; default: by the type] -- --config FILE --workdir /mnt/NAME/run
  list             lists the workloads of --cluster
  logs WORKLOAD    follows worker 0's log (kubectl)
  stop WORKLOAD    ends it and gives the slices back: pods get SIGTERM and two minutes to save
  delete NAME      deletes the cluster

All commands take --zone ZONE [--project PROJECT]. The JobSet starts all pods of a workload again when training ends with
exit code 75 or a pod is lost. Pods keep no files, so --workdir and the data must be in mounted storage.
TEXT
}
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

zone='' project='' cluster='' type='' image='' slices=1 max_restarts=100 priority=medium flags='' spot='' on_demand='' reservation='' storage='' bucket=''
options "--zone --project --cluster --type --image --slices --max_restarts --priority --flags --reservation --storage --bucket" "--spot --on_demand" "$@"
[ ${#REST[@]} -gt 0 ] || { usage >&2; die "give a command."; }
command=${REST[0]} name=${REST[1]:-}
number --slices slices
number --max_restarts max_restarts
case $command in
image | list) [ ${#REST[@]} -eq 1 ] || die "unexpected argument '$name'." ;;
cluster | storage | run | logs | stop | delete)
  [ ${#REST[@]} -eq 2 ] || die "give $command and one name."
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "the name must be small letters, digits and dashes, got '$name'."
  ;;
*) die "unknown command '$command'; known: image, cluster, storage, run, list, logs, stop, delete." ;;
esac
place=(--zone "$zone" ${project:+--project "$project"})
case $command in image | logs) ;; *)
  [ -n "$zone" ] || die "give --zone, for example --zone us-east5-a."
  need xpk "pip install xpk."
  ;;
esac
case $command in list | storage | run | stop) [ -n "$cluster" ] || die "give --cluster." ;; esac
case $command in image | run) [[ $image == */*:* ]] || die "--image must be like us-docker.pkg.dev/PROJECT/REPOSITORY/fusion_jax:TAG." ;; esac
case $command in cluster | run)
  [[ $type =~ ^(v4|v5litepod|v5p|v6e)-[0-9]+$ ]] || die "--type must be like v4-8, v5litepod-16, v5p-256 or v6e-8, got '$type'."
  ;;
esac

[ "$command" != storage ] || [ -n "$bucket" ] || die "storage needs --bucket."

capacity() {
  local chosen="${spot:+1}${on_demand:+1}${reservation:+1}"
  ((${#chosen} <= 1)) || die "--spot, --on_demand and --reservation exclude each other."
  run xpk cluster create --cluster "$name" --tpu-type "$type" --num-slices "$slices" "${place[@]}" \
    --enable-workload-identity --enable-gcsfuse-csi-driver ${spot:+--spot} ${on_demand:+--on-demand} ${reservation:+--reservation "$reservation"}
}

train() {
  local workdir='' i line
  for ((i = 0; i < ${#AFTER[@]}; i++)); do
    case ${AFTER[i]} in
    --workdir=*) workdir=${AFTER[i]#*=} ;;
    --workdir) workdir=${AFTER[i + 1]:-} ;;
    esac
  done
  [ -n "$storage" ] && [[ $workdir == /mnt/$storage/* ]] ||
    die "--workdir='$workdir' would be lost with its pod; give --storage NAME and, after --, --workdir /mnt/NAME/..."
  case ${flags:-$type} in
  v5litepod-*) flags=v5e ;;
  *-*) flags=${type%%-*} ;;
  esac
  line=$(shown bash launch/train.sh --once --flags "$flags" -- "${AFTER[@]}")
  # `exec`, so that Kubernetes' SIGTERM reaches training and its exit code reaches the JobSet.
  run xpk workload create --workload "$name" --cluster "$cluster" --tpu-type "$type" --num-slices "$slices" "${place[@]}" \
    --docker-image "$image" --storage "$storage" --priority "$priority" --max-restarts "$max_restarts" --restart-on-exit-codes 75 \
    --termination-grace-period-seconds 120 --command "cd /opt/fusion_jax && exec $line"
}

case $command in
image)
  need docker "see https://docs.docker.com/engine/install."
  run docker build --file "$root/launch/Dockerfile" --build-arg EXTRA=tpu --tag "$image" "$root" && run docker push "$image"
  ;;
cluster) capacity ;;
storage)
  # xpk requires --size, which means nothing for a bucket.
  run xpk storage attach "$name" --cluster "$cluster" "${place[@]}" --type gcsfuse --bucket "$bucket" --mount-point "/mnt/$name" \
    --size 1000 --auto-mount false --readonly false --mount-options implicit-dirs,rename-dir-limit=100000
  ;;
run) train ;;
list) run xpk workload list --cluster "$cluster" "${place[@]}" ;;
logs)
  need kubectl "gcloud components install kubectl."
  run kubectl logs --follow --tail 200 --selector "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
  ;;
stop) run xpk workload delete --workload "$name" --cluster "$cluster" "${place[@]}" ;;
delete) run xpk cluster delete --cluster "$name" "${place[@]}" ;;
esac
