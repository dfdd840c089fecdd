#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, in a container (Pyxis and Enroot) or in this checkout's environment.
usage() {
  cat <<'TEXT'
bash launch/slurm.sh --nodes N [options] [--dry_run] -- --config FILE --workdir DIR ...

  --nodes N            machines (default: 1)
  --gpus N             GPUs of each machine (default: 8); each has one process, as JAX expects under SLURM
  --image IMAGE        container: a .sqsh file, or registry#name:tag; without it launch/env.sh makes .venv first
  --mounts LIST        folders to mount, SRC:DST,SRC:DST; this checkout is always mounted at /opt/fusion_jax/checkout
  --time LIMIT         wall-clock limit in SLURM's form (default: 24:00:00); afterwards training continues in a new job
  --cpus N             CPU cores of each process (default: 8)
  --name NAME          name of the job (default: fusion_jax)   --partition P   --account A   --qos Q
  --grace SECONDS      SIGTERM is sent this long before the limit (default: 120)

Data, --workdir and the checkout must be on a file system that all nodes share. The job goes back into the queue when
training ends with exit code 75, up to three times in a row when it fails (exit code 1, or above 128: killed), and by SLURM
when a node fails or the job is preempted. In every other case it ends.

To make a .sqsh file:
               docker build --file launch/Dockerfile --build-arg EXTRA=gpu --tag fusion_jax:gpu . &&
               enroot import --output fusion_jax.sqsh dockerd://fusion_jax:gpu
TEXT
}
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

nodes=1 gpus=8 image='' mounts='' time=24:00:00 cpus=8 name=fusion_jax partition='' account='' qos='' grace=120
options "--nodes --gpus --image --mounts --time --cpus --name --partition --account --qos --grace" "" "$@"
[ ${#REST[@]} -eq 0 ] || die "unexpected argument '${REST[0]}'; training's own flags follow --."
[[ " ${AFTER[*]} " =~ \ --config[=\ ] && " ${AFTER[*]} " =~ \ --workdir[=\ ] ]] ||
  die "give training's flags after --, with --config FILE and --workdir DIR."
for option in nodes gpus cpus grace; do
  number "--$option" "$option"
  ((${!option} > 0)) || die "--$option must be at least 1."
done
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || die "--time must be like 90, 12:00:00 or 2-00:00:00, got '$time'."
[[ -z $mounts || $mounts =~ ^[^:,]+:[^:,]+(,[^:,]+:[^:,]+)*$ ]] || die "--mounts must be SRC:DST,SRC:DST, got '$mounts'."
if [[ $image == *.sqsh && -z ${DRY_RUN:-} ]]; then [ -e "$image" ] || die "$image does not exist."; fi
need sbatch "run this on a login node of the cluster."

run mkdir -p "$root/runs/slurm" || exit
run sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus" --cpus-per-task "$cpus" \
  --exclusive --time "$time" ${partition:+--partition "$partition"} ${account:+--account "$account"} ${qos:+--qos "$qos"} \
  --requeue --open-mode append --signal "B:TERM@$grace" --output "$root/runs/slurm/%x-%j.log" --chdir "$root" \
  "$root/launch/slurm_job.sh" "$image" "$mounts" "${AFTER[@]}"
