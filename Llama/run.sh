#!/usr/bin/env bash
# Trains a small Llama with each optimizer through torchtitan, prints a table and draws the curves into images/.
#   bash Llama/run.sh                                       Python's own source, 2 ranks with FSDP2: minutes, anywhere
#   bash Llama/run.sh Llama/train_configs/llama2_7b.toml    Llama-2-7B on C4, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash Llama/run.sh       some optimizers, one rate
#   bash Llama/run.sh --training.steps 800                  any knob of Llama/train.py, passed on
#   bash Llama/run.sh --job.resume                          what an interruption left undone
# On several nodes that share a file system, the same command on each, NODE_RANK being 1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash Llama/run.sh Llama/train_configs/llama2_7b.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

# The knobs that are changed first. Empty means: as the config says.
OPTIMIZERS=${OPTIMIZERS:-olion muon adamuon lion adamw}
LR=${LR:-}                   # peak learning rate of the matrices, for every optimizer
SEED=${SEED:-}
METRICS=${METRICS-val/loss}  # what is drawn; set to nothing, there is no picture
GROUP=${GROUP:-}             # runs/llama/GROUP holds the runs, and the picture shows all of them; the config's name

# The machines; NNODES, NODE_RANK and RDZV_ENDPOINT are in scripts/launch.sh.
NGPU=${NGPU:-}               # processes on this machine; empty: one a GPU, or two on CPUs

CONFIG=Llama/train_configs/stdlib.toml
if [[ $# -gt 0 && "$1" != -* ]]; then
  CONFIG=$1
  shift
fi
GROUP=${GROUP:-$(basename "$CONFIG" .toml)}
for argument in "$@"; do
  case $argument in
    --job.group* | --job.dump?folder*) refuse "the picture is of runs/llama/GROUP; set GROUP instead of $argument" ;;
  esac
done
check_config
check_nodes
PYTHON=$(bash scripts/setup.sh)
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
share_cores

flags=("$@" --job.group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$SEED" ]] || flags+=(--debug.seed "$SEED")

case " $* " in *" --help "* | *" -h "*) exec "$PYTHON" -m Llama.train "$CONFIG" --help ;; esac
[[ "$NODE_RANK" -gt 0 ]] || WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON" -m Llama.prepare "$CONFIG" "${flags[@]}"

train_each Llama.train --job.resume "$CONFIG" "${flags[@]}"
if [[ "$NODE_RANK" -eq 0 && -n "$METRICS" ]]; then
  # shellcheck disable=SC2086  # several words
  "$PYTHON" -m scripts.figures "runs/llama/$GROUP" --out "images/llama_$GROUP.png" --metric $METRICS
fi
tell_diverged
