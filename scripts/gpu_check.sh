#!/usr/bin/env bash
# Checks and measures this repository on the GPUs of this machine, in about five minutes; writes a table and a JSON.
#   bash scripts/gpu_check.sh                      everything, to runs/gpu_check.json
#   bash scripts/gpu_check.sh --only layouts       one section
# Without a GPU each section runs at toy size on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh)
exec "$PYTHON" -m scripts.gpu_check "$@"
