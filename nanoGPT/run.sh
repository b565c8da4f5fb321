#!/usr/bin/env bash
# Trains a GPT with each optimizer, prints a table and draws the validation curves into runs/nanogpt/GROUP.
#   bash nanoGPT/run.sh                                        a small GPT on Python's own source: minutes, anywhere
#   bash nanoGPT/run.sh nanoGPT/configs/gpt2_small.toml        GPT-2 on OpenWebText, on all GPUs of this machine
#   OPTIMIZERS="olion muon" LR=1e-3 bash nanoGPT/run.sh        some optimizers, one rate
#   bash nanoGPT/run.sh --model.n_layer 6 --steps 1000         any knob of nanoGPT/train.py, passed on
#   bash nanoGPT/run.sh --resume                               what an interruption left undone, on any number of GPUs
#   bash nanoGPT/run.sh --resume --publish                     the picture into images/ instead, where git tracks it
#   PARALLEL=fsdp SCALE=gpt2_xl bash nanoGPT/run.sh            weights, gradients and state divided among the GPUs
# On several nodes that share a file system: once, on one of them, `bash scripts/setup.sh` and
# `.venv/bin/python -m nanoGPT.prepare openwebtext`; then on each, NODE_RANK being 1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash nanoGPT/run.sh nanoGPT/configs/gpt2_xl.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXPERIMENT=nanogpt
source scripts/launch.sh # OPTIMIZERS, LR, SEED, GROUP, NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT

# Knobs beside those of scripts/launch.sh. Empty means: as the config says.
SCALE=${SCALE:-}             # stdlib, gpt2_small, gpt2_medium, gpt2_large or gpt2_xl: a file of nanoGPT/configs
BATCH=${BATCH:-}             # sequences per step, over all GPUs
MICRO_BATCH=${MICRO_BATCH:-} # most sequences on one GPU at once
PARALLEL=${PARALLEL:-}       # ddp: all on every GPU; fsdp: divided among all; hsdp: among those of one machine

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
