#!/usr/bin/env bash
# Trains a SiT with each optimizer, prints tables, and draws curves and samples into runs/sit/GROUP.
#   bash SIT/run.sh                                        handwritten digits: minutes on a CPU, no download
#   bash SIT/run.sh SIT/configs/sit_b2_imagenet.toml       SiT-B/2 with REPA on ImageNet-256 latents, on all local GPUs
#   OPTIMIZERS="olion muon" LR=2e-3 bash SIT/run.sh        these optimizers, at this learning rate
#   GROUP=plain bash SIT/run.sh --objective.encoder "" --model.z_dim 0    any option of SIT/train.py: here, without REPA
#   bash SIT/run.sh --resume                               continue after an interruption
#   bash SIT/run.sh --resume --publish                     draw the figures into images/, which git tracks
# On several nodes with a shared file system, the same command on each, with NODE_RANK=1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash SIT/run.sh SIT/configs/sit_b2_imagenet.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXPERIMENT=sit
source scripts/launch.sh # OPTIMIZERS, LR, SEED, GROUP, NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT

# A variable besides those of scripts/launch.sh; empty: the config's value.
PARALLEL=${PARALLEL:-}       # ddp: a copy per GPU; fsdp: sharded over all; hsdp: over those of one machine

read_arguments SIT/configs/digits.toml "$@"
find_processes 1
[[ -z "$wants_help" ]] || exec "$PYTHON" -m SIT.train "$CONFIG" --help
flags+=(--group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$SEED" ]] || flags+=(--seed "$SEED")
[[ -z "$PARALLEL" ]] || flags+=(--parallel.mode "$PARALLEL")

if is_first_node; then "$PYTHON" -m SIT.prepare "$CONFIG" "${flags[@]}"; fi
train_each SIT.train --resume "$CONFIG" "${flags[@]}"
if is_first_node; then
  "$PYTHON" -m scripts.figures "runs/sit/$GROUP" --metric val/denoising_loss val/projection_loss --out "$(picture)"
  "$PYTHON" -m SIT.evaluate "runs/sit/$GROUP" --skip-latents --out "$(picture samples)"
fi
tell_end
