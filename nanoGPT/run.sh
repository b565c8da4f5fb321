#!/usr/bin/env bash
# Trains a GPT with each optimizer, prints a table and draws the validation curves into images/.
#   bash nanoGPT/run.sh                                        a small GPT on Python's own source: minutes, anywhere
#   bash nanoGPT/run.sh nanoGPT/configs/gpt2_small.toml        GPT-2 on OpenWebText, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash nanoGPT/run.sh        some optimizers, one rate
#   bash nanoGPT/run.sh --resume --steps 1000                  any knob of nanoGPT/train.py, passed on
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash nanoGPT/run.sh nanoGPT/configs/gpt2_xl.toml   on each node
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The knobs that are changed first. Empty means: as the config says.
OPTIMIZERS=${OPTIMIZERS:-olion muon adamuon lion adamw}
SCALE=${SCALE:-}           # stdlib, gpt2_small, gpt2_medium, gpt2_large or gpt2_xl: a file of nanoGPT/configs
LR=${LR:-}                 # peak learning rate of the matrices, for every optimizer
BATCH=${BATCH:-}           # sequences a step, over all GPUs
MICRO_BATCH=${MICRO_BATCH:-} # sequences on one GPU at once
SEED=${SEED:-}

# The machines.
NGPU=${NGPU:-}             # processes on this machine; empty: one a GPU, or one on a CPU
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0} # host:port of node 0; port 0 takes a free one, for a single node

CONFIG=nanoGPT/configs/${SCALE:-stdlib}.toml
if [[ $# -gt 0 && "$1" != -* ]]; then
  CONFIG=$1
  shift
fi
GROUP=${GROUP:-$(basename "$CONFIG" .toml)} # runs/nanogpt/GROUP holds the runs, and the picture shows all of them
PYTHON=$(bash scripts/setup.sh)
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

flags=()
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$BATCH" ]] || flags+=(--data.batch-size "$BATCH")
[[ -z "$MICRO_BATCH" ]] || flags+=(--data.micro-batch "$MICRO_BATCH")
[[ -z "$SEED" ]] || flags+=(--seed "$SEED")

launcher=("$PYTHON")
if [[ "$NGPU" -gt 1 || "$NNODES" -gt 1 ]]; then
  launcher=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NGPU" --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT")
fi

"$PYTHON" -m nanoGPT.prepare "$CONFIG" "${flags[@]}" "$@"
for optimizer in $OPTIMIZERS; do
  "${launcher[@]}" -m nanoGPT.train "$CONFIG" --optimizer.name "$optimizer" --group "$GROUP" "${flags[@]}" "$@"
done
"$PYTHON" -m scripts.figures "runs/nanogpt/$GROUP" --out "images/nanogpt_$GROUP.png"
