#!/usr/bin/env bash
# Trains a GPT with each optimizer, prints a table and draws the validation curves into runs/nanogpt/GROUP.
#   bash nanoGPT/run.sh                                        a small GPT on the standard library: minutes on a CPU
#   bash nanoGPT/run.sh nanoGPT/configs/gpt2_small.toml        GPT-2 on OpenWebText, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash nanoGPT/run.sh        these optimizers, at this learning rate
#   bash nanoGPT/run.sh --model.n_layer 6 --steps 1000         any option of nanoGPT/train.py
#   bash nanoGPT/run.sh --resume                               continue after an interruption, on any number of GPUs
#   bash nanoGPT/run.sh --resume --publish                     draw the figure into images/, which git tracks
#   PARALLEL=fsdp SCALE=gpt2_xl bash nanoGPT/run.sh            weights, gradients and state sharded over the GPUs
# On several nodes with a shared file system: once, on one node, `bash scripts/setup.sh` and
# `.venv/bin/python -m nanoGPT.prepare openwebtext`; then on each node, with NODE_RANK=1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash nanoGPT/run.sh nanoGPT/configs/gpt2_xl.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXPERIMENT=nanogpt
source scripts/launch.sh # OPTIMIZERS, LR, SEED, GROUP, NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT

# Variables besides those of scripts/launch.sh; empty: the config's value.
SCALE=${SCALE:-}             # stdlib, gpt2_small, gpt2_medium, gpt2_large or gpt2_xl: a file of nanoGPT/configs
BATCH=${BATCH:-}             # sequences per step, over all GPUs
MICRO_BATCH=${MICRO_BATCH:-} # sequences per forward pass on one GPU
PARALLEL=${PARALLEL:-}       # ddp: a copy per GPU; fsdp: sharded over all; hsdp: over those of one machine

read_arguments "nanoGPT/configs/${SCALE:-stdlib}.toml" "$@"
find_processes 1
[[ -z "$wants_help" ]] || exec "$PYTHON" -m nanoGPT.train "$CONFIG" --help
flags+=(--group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$SEED" ]] || flags+=(--seed "$SEED")
[[ -z "$BATCH" ]] || flags+=(--data.batch_size "$BATCH")
[[ -z "$MICRO_BATCH" ]] || flags+=(--data.micro_batch "$MICRO_BATCH")
[[ -z "$PARALLEL" ]] || flags+=(--parallel.mode "$PARALLEL")

if is_first_node; then "$PYTHON" -m nanoGPT.prepare "$CONFIG" "${flags[@]}"; fi
train_each nanoGPT.train --resume "$CONFIG" "${flags[@]}"
if is_first_node; then "$PYTHON" -m scripts.figures "runs/nanogpt/$GROUP" --out "$(picture)"; fi
tell_end
