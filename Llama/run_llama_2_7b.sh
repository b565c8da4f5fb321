#!/usr/bin/env bash
# Pretrains Llama-2-7B on C4 with the paper's settings: every knob is in Llama/train_configs/llama2_7b.toml.
#   bash Llama/run_llama_2_7b.sh                                            OLion on the 8 GPUs of this machine
#   OPTIMIZERS="olion muon adamw" bash Llama/run_llama_2_7b.sh              one after the other, and their curves
#   bash Llama/run_llama_2_7b.sh --training.steps 4000 --optimizer.lr 1e-3  any knob, as torchtitan's
#   bash Llama/run_llama_2_7b.sh --job.resume                               from the last checkpoint, on any number of GPUs
# Several nodes: NNODES, NODE_RANK and RDZV_ENDPOINT as in Llama/run.sh, or scripts/slurm.sbatch. Each node then holds
# the whole model in shards (HSDP), so that only gradients travel between nodes, once per step; plain FSDP over all GPUs
# with --parallelism.data_parallel_replicate_degree 1. Needs the tokenizer of Llama-2 in
# data/Llama-2-7b-hf (hf download meta-llama/Llama-2-7b-hf tokenizer.json tokenizer_config.json --local-dir ...), or
# another folder with --model.hf_assets_path; C4 is streamed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${NNODES:-1} $*" in
  "1 "* | *--parallelism.data?parallel?replicate?degree*) ;;
  *) set -- --parallelism.data_parallel_replicate_degree "$NNODES" "$@" ;;
esac
OPTIMIZERS=${OPTIMIZERS:-olion} exec bash Llama/run.sh Llama/train_configs/llama2_7b.toml "$@"
