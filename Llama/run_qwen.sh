#!/usr/bin/env bash
# Pretrains the small Qwen2.5 by AdamW, by Muon with AdamW, and by Muon with PolarSGDM for the embedding, at every rate
# and seed (scripts.sweep), as a talk by W. Su compares them; prints the tables and draws the last losses.
#   bash Llama/run_qwen.sh                                  45 runs of 400 steps: an hour and a half on two cores
#   SEEDS=1337 LRS="4e-3 8e-3" REST_LRS=2 bash Llama/run_qwen.sh             some of them
#   bash Llama/run_qwen.sh training.steps=20                any option of Llama/train.py, as key=value
# Finished runs are not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=Llama/train_configs/qwen_stdlib.toml
OUT=${OUT:-images/sweep_llama_qwen_stdlib.json}
JOBS=${JOBS:-1} # runs at once
read -r -d '' -a seeds <<<"${SEEDS:-1337 1338 1339}" || true
read -r -d '' -a lrs <<<"${LRS:-4e-3 8e-3 1.6e-2}" || true # of the matrices
# Of PolarSGDM, whose update is as small as the gradient: after 20 steps 2 is ahead of 0.1 and 8.
read -r -d '' -a rest_lrs <<<"${REST_LRS:-5e-1 2 8}" || true

PYTHON=$(bash scripts/setup.sh)
"$PYTHON" -m Llama.prepare "$CONFIG"

# sweep OPTIMIZERS KEY=VALUE...
sweep() {
  local optimizers settings=()
  read -r -d '' -a optimizers <<<"$1" || true
  shift
  [[ $# -eq 0 ]] || settings=(--set "$@")
  "$PYTHON" -m scripts.sweep "$CONFIG" --module Llama.train --optimizers "${optimizers[@]}" --lrs "${lrs[@]}" \
    --seeds "${seeds[@]}" --jobs "$JOBS" --out "$OUT" "${settings[@]}"
}

sweep "adamw muon" "$@"
for rest_lr in "${rest_lrs[@]}"; do
  sweep muon optimizer.rest=polarsgdm "optimizer.rest_lr=$rest_lr" "$@"
done
