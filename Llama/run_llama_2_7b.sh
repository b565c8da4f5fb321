#!/usr/bin/env bash
# Pretrains Llama-2-7B on C4 with the paper's settings, Llama/train_configs/llama2_7b.toml.
#   bash Llama/run_llama_2_7b.sh                                            OLion on the 8 GPUs of this machine
#   OPTIMIZERS="olion muon adamw" bash Llama/run_llama_2_7b.sh              one after the other, and their curves
#   bash Llama/run_llama_2_7b.sh --training.steps 4000 --optimizer.lr 1e-3  any option of Llama/train.py
#   bash Llama/run_llama_2_7b.sh --job.resume                               continue, on any number of GPUs
# Several nodes: NNODES, NODE_RANK and RDZV_ENDPOINT as in Llama/run.sh, or scripts/slurm.sbatch. Each node then holds
# one sharded replica (HSDP), so that only gradients travel between nodes, once per step; for FSDP over all GPUs set
# --parallelism.data_parallel_replicate_degree 1. Needs Llama-2's tokenizer in data/Llama-2-7b-hf (hf download
# meta-llama/Llama-2-7b-hf tokenizer.json tokenizer_config.json --local-dir ...), or in --model.hf_assets_path; C4 is
# streamed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${NNODES:-1} $*" in
  "1 "* | *--parallelism.data?parallel?replicate?degree*) ;;
  *) set -- --parallelism.data_parallel_replicate_degree "$NNODES" "$@" ;;
esac
OPTIMIZERS=${OPTIMIZERS:-olion} exec bash Llama/run.sh Llama/train_configs/llama2_7b.toml "$@"
