#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits: slurm_job.sh IMAGE MOUNTS TRAINING-FLAGS...
# SLURM runs it once, on the first node; srun starts one process per GPU on all of them.
set -uo pipefail
image=$1 mounts=$2
shift 2
echo "job $SLURM_JOB_ID, run $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date '+%Y-%m-%d %H:%M:%S')"

# All tasks end when one does, since the others would wait for it in a collective.
step=(srun --kill-on-bad-exit=1 --label)
if [ -n "$image" ]; then
  # The image's environment, this checkout's code.
  step+=(--container-image "$image" --container-mounts "$PWD:/opt/fusion_jax/checkout${mounts:+,$mounts}"
    --container-workdir /opt/fusion_jax/checkout --no-container-mount-home)
else
  EXTRAS=gpu bash -c 'source launch/env.sh' || exit
  PATH=$PWD/.venv/bin:$PATH # srun hands the environment on
fi

# SIGTERM reaches only this script (--signal=B:). srun itself would kill its tasks on it, so SLURM sends it to them.
stopped=
trap 'stopped=1; echo "asked to stop: saving"; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
started=$SECONDS
# shellcheck disable=SC2016  # expanded in the tasks
"${step[@]}" bash -c 'eval "$(bash launch/xla_flags.sh gpu)" && exec python -m fusion_jax.train "$@"' train "$@" &
while :; do # a signal ends `wait` early
  stopped=
  wait $!
  code=$?
  [ -n "$stopped" ] || break
done

took=$((SECONDS - started))
echo "training ended with exit code $code after $took s"
failures=runs/slurm/failures-$SLURM_JOB_ID # failures in a row, in a file because every run of the job is a new process
if [ "$code" -eq 75 ]; then
  if ((took < 60)); then
    echo "error: it ended with exit code 75 within a minute of its start, so it did no work; not put back into the queue." >&2
    exit 1
  fi
  rm -f "$failures"
elif ((code == 1 || (code > 128 && code != 130))); then # as launch/restart.sh does
  count=0
  if ((took < 3600)) && [ -e "$failures" ]; then count=$(cat "$failures"); fi
  if ((count >= 3)); then
    echo "error: it failed, as in the last $count runs; not put back into the queue." >&2
    exit "$code"
  fi
  mkdir -p runs/slurm && echo $((count + 1)) >"$failures" || exit "$code" # without a count it might be repeated for ever
else
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
