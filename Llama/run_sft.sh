#!/usr/bin/env bash
# Fine-tunes a Llama on instructions with each optimizer, prints a table and draws the curves into runs/llama/GROUP.
#   bash Llama/run_sft.sh                                             the small Llama on word problems: minutes on a CPU
#   bash Llama/run_sft.sh Llama/train_configs/sft_llama3_8b.toml      Llama-3.1-8B on MathInstruct, on all local GPUs
#   BASE=runs/llama/stdlib/muon-... bash Llama/run_sft.sh             from other weights: Hugging Face's, or a run's
#   OPTIMIZERS="olion adamw" LR=1e-3 bash Llama/run_sft.sh --training.steps 200    options as in Llama/run.sh
# The small Llama is first pretrained by AdamW, once: as in the paper, each optimizer fine-tunes AdamW's weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=Llama/train_configs/sft_arithmetic.toml
if [[ $# -gt 0 && "$1" != -* ]]; then
  CONFIG=$1
  shift
fi
BASE=${BASE:-} # weights to start from; empty: the config's

if [[ "$CONFIG" == */sft_arithmetic.toml && -z "$BASE" ]]; then
  finished() { find runs/llama/sft_base -path '*/adamw-*/finished.json' 2>/dev/null | head -n 1; }
  case " $* " in *" --help "* | *" -h "*) ;; *)
    if [[ -z "$(finished)" ]]; then
      echo "pretraining the small Llama with AdamW, once"
      OPTIMIZERS=adamw LR="" SEED="" GROUP=sft_base METRICS= bash Llama/run.sh Llama/train_configs/stdlib.toml --job.resume
    fi
    ;;
  esac
  BASE=$(dirname "$(finished)")
fi
[[ -z "$BASE" ]] || set -- --checkpoint.initial_load_path "$BASE" "$@"
METRICS="val/loss val/exact_match val/pretrain_loss" exec bash Llama/run.sh "$CONFIG" "$@"
