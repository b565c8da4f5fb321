#!/usr/bin/env bash
# Trains a small Llama with each optimizer through torchtitan, prints a table and draws curves into runs/llama/GROUP.
#   bash Llama/run.sh                                       Python's standard library, 2 FSDP2 ranks: minutes on a CPU
#   bash Llama/run.sh Llama/train_configs/llama2_7b.toml    Llama-2-7B on C4, on all local GPUs
#   OPTIMIZERS="olion muon" LR=1e-3 bash Llama/run.sh       these optimizers, at this learning rate
#   bash Llama/run.sh --training.steps 800                  any option of Llama/train.py
#   bash Llama/run.sh --job.resume                          continue after an interruption
#   bash Llama/run.sh --job.resume --publish                draw the figure into images/, which git tracks
# On several nodes with a shared file system, the same command on each, with NODE_RANK=1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash Llama/run.sh Llama/train_configs/llama2_7b.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXPERIMENT=llama
source scripts/launch.sh # OPTIMIZERS, LR, SEED, GROUP, NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT

# A variable besides those of scripts/launch.sh.
METRICS=${METRICS-val/loss}  # metrics to draw; empty: no figure

read_arguments Llama/train_configs/stdlib.toml "$@"
find_processes 2 # on a CPU too, so that steps communicate
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
