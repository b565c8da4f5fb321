#!/usr/bin/env bash
# Trains a small Llama with each optimizer through torchtitan, prints a table and draws the curves into runs/llama/GROUP.
#   bash Llama/run.sh                                       Python's own source, 2 ranks with FSDP2: minutes, anywhere
#   bash Llama/run.sh Llama/train_configs/llama2_7b.toml    Llama-2-7B on C4, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash Llama/run.sh       some optimizers, one rate
#   bash Llama/run.sh --training.steps 800                  any knob of Llama/train.py, passed on
#   bash Llama/run.sh --job.resume                          what an interruption left undone
#   bash Llama/run.sh --job.resume --publish                the picture into images/ instead, where git tracks it
# On several nodes that share a file system, the same command on each, NODE_RANK being 1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash Llama/run.sh Llama/train_configs/llama2_7b.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXPERIMENT=llama
source scripts/launch.sh # OPTIMIZERS, LR, SEED, GROUP, NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT

# A knob beside those of scripts/launch.sh.
METRICS=${METRICS-val/loss}  # what is drawn; set to nothing, there is no picture

read_arguments Llama/train_configs/stdlib.toml "$@"
find_processes 2 # without a GPU too, a step communicates
[[ -z "$wants_help" ]] || exec "$PYTHON" -m Llama.train "$CONFIG" --help
read -r -d '' -a metrics <<<"$METRICS" || true
flags+=(--job.group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$SEED" ]] || flags+=(--debug.seed "$SEED")

if is_first_node; then WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON" -m Llama.prepare "$CONFIG" "${flags[@]}"; fi
train_each Llama.train --job.resume "$CONFIG" "${flags[@]}"
if is_first_node && [[ ${#metrics[@]} -gt 0 ]]; then
  "$PYTHON" -m scripts.figures "runs/llama/$GROUP" --out "$(picture)" --metric "${metrics[@]}"
fi
tell_end
