#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, data, three stages, evaluation. About 15 minutes on 2 cores.
# Started again, it goes on where it stopped.
start=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run=${RUN:-runs/quickstart}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

python -m fusion_jax.synthesize --config "configs/quickstart_data.py:${SAMPLES:-}" --out "$run/data"

train_start=$SECONDS
python -m fusion_jax.train --config "configs/quickstart.py:$run/data" --workdir "$run"
train_seconds=$((SECONDS - train_start))

python -m fusion_jax.evaluate --checkpoint "$run" --tasks held_out --data_dir "$run/data" --scores_file "$run/evaluation.json" --show 5

python - "$run" "$train_seconds" "$((SECONDS - start))" <<'PY'
import json, sys
from pathlib import Path

run, train_seconds, total_seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
scores = json.loads((run / "evaluation.json").read_text())["held_out"]
del scores["examples"]
summary = {**scores, "train_seconds": train_seconds, "total_seconds": total_seconds}
(run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
print(json.dumps(summary, indent=2))
PY
echo "written: $run/summary.json, $run/losses.png; TensorBoard: tensorboard --logdir $run"
