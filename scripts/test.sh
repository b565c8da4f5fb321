#!/usr/bin/env bash
# Runs lint, the type check and the tests; sets up the environment if there is none.
#   bash scripts/test.sh                    everything: minutes
#   bash scripts/test.sh --fast             the quick files (tests/conftest.py), without types: under a minute
#   bash scripts/test.sh tests/test_polar.py -k gram    pytest's arguments; on one core
# Without pytest's arguments the tests run on all cores, at most 8, each file on one (OMP_NUM_THREADS is 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh)

arguments=()
types=yes
if [[ $# == 0 || "$*" == --fast ]]; then arguments+=(-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder); fi
for argument in "$@"; do
  if [[ "$argument" == --fast ]]; then
    arguments+=(-m "not slow")
    types=""
  else
    arguments+=("$argument")
  fi
done

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
[[ -z "$types" ]] || "$PYTHON" -m pyright --pythonpath "$PYTHON"
export WANDB_MODE=${WANDB_MODE:-offline} # no test may reach a server
exec "$PYTHON" -m pytest ${arguments[@]+"${arguments[@]}"}
