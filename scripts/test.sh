#!/usr/bin/env bash
# Runs the whole test suite, lint first; sets up the environment if there is none.
#   bash scripts/test.sh                    everything
#   bash scripts/test.sh tests/test_polar.py -k gram
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh)

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export WANDB_MODE=${WANDB_MODE:-offline} # no test may reach a server
exec "$PYTHON" -m pytest "$@"
