#!/usr/bin/env bash
# Trains a GPT with each optimizer, prints a table and draws the validation curves into images/.
#   bash nanoGPT/run.sh                                        a small GPT on Python's own source: minutes, anywhere
#   bash nanoGPT/run.sh nanoGPT/configs/gpt2_small.toml        GPT-2 on OpenWebText, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash nanoGPT/run.sh        some optimizers, one rate
#   bash nanoGPT/run.sh --model.n_layer 6 --steps 1000         any knob of nanoGPT/train.py, passed on
#   bash nanoGPT/run.sh --resume                               what an interruption left undone, on any number of GPUs
#   PARALLEL=fsdp SCALE=gpt2_xl bash nanoGPT/run.sh            weights, gradients and state divided among the GPUs
# On several nodes that share a file system: once, on one of them, `bash scripts/setup.sh` and
# `.venv/bin/python -m nanoGPT.prepare openwebtext`; then on each, NODE_RANK being 1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash nanoGPT/run.sh nanoGPT/configs/gpt2_xl.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

# The knobs that are changed first. Empty means: as the config says.
OPTIMIZERS=${OPTIMIZERS:-olion muon adamuon lion adamw}
SCALE=${SCALE:-}             # stdlib, gpt2_small, gpt2_medium, gpt2_large or gpt2_xl: a file of nanoGPT/configs
LR=${LR:-}                   # peak learning rate of the matrices, for every optimizer
BATCH=${BATCH:-}             # sequences a step, over all GPUs
MICRO_BATCH=${MICRO_BATCH:-} # most sequences on one GPU at once
SEED=${SEED:-}
PARALLEL=${PARALLEL:-}       # ddp: all on every GPU; fsdp: divided among all; hsdp: among those of one machine
GROUP=${GROUP:-}             # runs/nanogpt/GROUP holds the runs, and the picture shows all of them; the config's name

# The machines; NNODES, NODE_RANK and RDZV_ENDPOINT are in scripts/launch.sh.
NGPU=${NGPU:-}               # processes on this machine; empty: one a GPU, or one on a CPU

CONFIG=nanoGPT/configs/${SCALE:-stdlib}.toml
if [[ $# -gt 0 && "$1" != -* ]]; then
  CONFIG=$1
  shift
fi
GROUP=${GROUP:-$(basename "$CONFIG" .toml)}
for argument in "$@"; do
  case $argument in
    --group* | --out*) refuse "the picture is of runs/nanogpt/GROUP; set GROUP instead of $argument" ;;
  esac
done
check_config
check_nodes
PYTHON=$(bash scripts/setup.sh)
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
share_cores

flags=("$@" --group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$BATCH" ]] || flags+=(--data.batch_size "$BATCH")
[[ -z "$MICRO_BATCH" ]] || flags+=(--data.micro_batch "$MICRO_BATCH")
[[ -z "$SEED" ]] || flags+=(--seed "$SEED")
[[ -z "$PARALLEL" ]] || flags+=(--parallel.mode "$PARALLEL")

case " $* " in *" --help "* | *" -h "*) exec "$PYTHON" -m nanoGPT.train "$CONFIG" --help ;; esac
[[ "$NODE_RANK" -gt 0 ]] || "$PYTHON" -m nanoGPT.prepare "$CONFIG" "${flags[@]}"

train_each nanoGPT.train --resume "$CONFIG" "${flags[@]}"
[[ "$NODE_RANK" -gt 0 ]] || "$PYTHON" -m scripts.figures "runs/nanogpt/$GROUP" --out "images/nanogpt_$GROUP.png"
tell_diverged
