#!/usr/bin/env bash
# Trains a SiT with each optimizer, prints tables, and draws curves and samples into images/.
#   bash SIT/run.sh                                        handwritten digits: minutes, anywhere, no download
#   bash SIT/run.sh SIT/configs/sit_b2_imagenet.toml       SiT-B/2 with REPA on ImageNet-256 latents, on all GPUs here
#   OPTIMIZERS="olion muon" LR=2e-3 bash SIT/run.sh        some optimizers, one rate
#   GROUP=plain bash SIT/run.sh --objective.encoder "" --model.z_dim 0    any knob of SIT/train.py: here, without REPA
#   bash SIT/run.sh --resume                               what an interruption left undone
# On several nodes that share a file system, the same command on each, NODE_RANK being 1 on the second:
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 bash SIT/run.sh SIT/configs/sit_b2_imagenet.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

# The knobs that are changed first. Empty means: as the config says.
OPTIMIZERS=${OPTIMIZERS:-olion muon adamuon lion adamw}
LR=${LR:-}                   # peak learning rate of the matrices, for every optimizer
SEED=${SEED:-}
PARALLEL=${PARALLEL:-}       # ddp: all on every GPU; fsdp: divided among all; hsdp: among those of one machine
GROUP=${GROUP:-}             # runs/sit/GROUP holds the runs, and the pictures show all of them; the config's name

# The machines; NNODES, NODE_RANK and RDZV_ENDPOINT are in scripts/launch.sh.
NGPU=${NGPU:-}               # processes on this machine; empty: one a GPU, or one on a CPU

CONFIG=SIT/configs/digits.toml
if [[ $# -gt 0 && "$1" != -* ]]; then
  CONFIG=$1
  shift
fi
GROUP=${GROUP:-$(basename "$CONFIG" .toml)}
for argument in "$@"; do
  case $argument in
    --group* | --out*) refuse "the pictures are of runs/sit/GROUP; set GROUP instead of $argument" ;;
  esac
done
check_config
check_nodes
PYTHON=$(bash scripts/setup.sh)
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
share_cores

flags=("$@" --group "$GROUP")
[[ -z "$LR" ]] || flags+=(--optimizer.lr "$LR")
[[ -z "$SEED" ]] || flags+=(--seed "$SEED")
[[ -z "$PARALLEL" ]] || flags+=(--parallel.mode "$PARALLEL")

case " $* " in *" --help "* | *" -h "*) exec "$PYTHON" -m SIT.train "$CONFIG" --help ;; esac
if [[ "$NODE_RANK" -eq 0 ]] && grep -q '^kind = "digits"' "$CONFIG"; then
  "$PYTHON" -m SIT.prepare digits
fi

train_each SIT.train --resume "$CONFIG" "${flags[@]}"
if [[ "$NODE_RANK" -eq 0 ]]; then
  "$PYTHON" -m scripts.figures "runs/sit/$GROUP" --metric val/denoising_loss val/projection_loss \
    --out "images/sit_$GROUP.png"
  if grep -q '"kind": "digits"' "runs/sit/$GROUP"/*/config.json; then
    "$PYTHON" -m SIT.evaluate "runs/sit/$GROUP" --out "images/sit_${GROUP}_samples.png"
  fi
fi
tell_diverged
