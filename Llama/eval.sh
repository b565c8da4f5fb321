#!/usr/bin/env bash
# Scores models with lm-eval and prints a table of their accuracies: GSM8K, MATH, NumGLUE, SimulEq and AQuA.
#   bash Llama/eval.sh data/Llama-3.1-8B runs/llama/sft_llama3_8b/*    Hugging Face weights, and runs (their newest)
#   TASKS=arithmetic_problems-0 bash Llama/eval.sh runs/llama/sft_arithmetic/*    the small Llama on its word problems
#   LIMIT=100 BATCH=64 bash Llama/eval.sh RUN                          the first 100 problems of each task
#   bash Llama/eval.sh RUN --log_samples --seed 1                      any option of lm_eval
# Results are written to each model's folder: eval/*.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh # refuse

# Tasks of lm-eval and of Llama/tasks with their numbers of worked examples; those of the paper, arXiv 2602.01105.
TASKS=${TASKS:-gsm8k-0 gsm8k-4 minerva_math-0 numglue-0 numglue-4 simuleq-0 aqua-0}
LIMIT=${LIMIT:-}         # problems per task; empty: all
BATCH=${BATCH:-16}       # problems per batch; "auto": as many as fit in the GPU's memory
TOKENS=${TOKENS:-512}    # longest response, in tokens
EVAL_DATA=${EVAL_DATA:-} # a folder with numglue.jsonl, simuleq.jsonl, ...; empty: downloaded

models=()
while [[ $# -gt 0 && "$1" != -* ]]; do
  models+=("$1")
  shift
done
case " $* " in *" --help "* | *" -h "*) exec "$(bash scripts/setup.sh)" -m Llama.evaluate --help ;; esac
[[ ${#models[@]} -gt 0 ]] ||
  refuse "name the models to score, before any flag: folders of Hugging Face weights, or of runs; got none"
for argument in "$@"; do
  case $argument in
    --tasks* | --num_fewshot*) refuse "set TASKS instead of $argument, as in TASKS='gsm8k-0 gsm8k-4'" ;;
    --output_path*) refuse "results are written to the model's folder; leave out $argument" ;;
  esac
done

read -r -d '' -a tasks <<<"$TASKS" || true # words, without expanding *
[[ ${#tasks[@]} -gt 0 ]] || refuse "TASKS must name at least one task; got '$TASKS'"

own=${PYTHON:-}
PYTHON=$(bash scripts/setup.sh)
if ! "$PYTHON" -c 'from importlib.util import find_spec; import sys
sys.exit(not all(map(find_spec, ("lm_eval", "accelerate", "math_verify", "antlr4"))))'; then
  install=(-m pip install -r Llama/requirements-eval.txt -c requirements.txt)
  [[ -z "$own" ]] || refuse "PYTHON=$own must have lm-eval; run: $own ${install[*]}"
  echo "installing lm-eval into .venv (once)" >&2
  "$PYTHON" "${install[@]}" --quiet >&2
fi

export LMEVAL_LOG_LEVEL=${LMEVAL_LOG_LEVEL:-WARNING}
flags=(--batch_size "$BATCH")
[[ -z "$LIMIT" ]] || flags+=(--limit "$LIMIT")
exec "$PYTHON" -m Llama.evaluate --models "${models[@]}" --tasks "${tasks[@]}" --tokens "$TOKENS" \
  ${EVAL_DATA:+--data "$EVAL_DATA"} -- "${flags[@]}" "$@"
