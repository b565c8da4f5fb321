#!/usr/bin/env bash
# Creates .venv with requirements.txt if there is none; prints the interpreter to use, and one line per stage on stderr.
#   bash scripts/setup.sh                              a local .venv, from python3.11 or newer
#   PYTHON=~/torch/bin/python bash scripts/setup.sh    your own interpreter: checked, nothing is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -n "${PYTHON:-}" ]]; then
  # Looked up, not imported: imports take seconds, and every run script starts here.
  "$PYTHON" -c 'import importlib.metadata, importlib.util
assert all(map(importlib.util.find_spec, ("datasets", "diffusers", "matplotlib", "numpy", "PIL", "sklearn", "tiktoken",
    "tokenizers", "torch", "torchtitan", "tqdm", "transformers", "tyro", "wandb")))
torch = importlib.metadata.version("torch")
assert tuple(map(int, torch.split(".")[:2])) >= (2, 11)' 2>/dev/null || {
    echo "error: PYTHON=$PYTHON needs the packages of requirements.txt; run: $PYTHON -m pip install -r requirements.txt" >&2
    exit 1
  }
  echo "$PYTHON"
  exit
fi

python=.venv/bin/python
stamp=.venv/requirements.installed # a copy of the installed requirements.txt, to detect changes
if [[ ! -x "$python" ]] || ! cmp -s requirements.txt "$stamp"; then
  base=""
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [[ -z "$base" ]]; then
    echo "error: Python 3.11 or newer is required and none was found; install one or set PYTHON" >&2
    exit 1
  fi
  if [[ ! -x "$python" ]]; then
    echo "setup 1/3: .venv with $("$base" --version)" >&2
    "$base" -m venv .venv || {
      rm -rf .venv
      echo "error: $base must be able to create a venv (on Debian: apt install python3-venv); or set PYTHON" >&2
      exit 1
    }
  fi
  # -qq: errors only, without pip's warnings about its version, cache or index.
  install() { "$python" -m pip install -qq --disable-pip-version-check "$@" >&2; }
  # torch first, so that no other package chooses another build of it.
  torch=$(grep -o '^torch==[^ ]*' requirements.txt)
  echo "setup 2/3: $torch (minutes the first time)" >&2
  install "$torch"
  echo "setup 3/3: the other packages of requirements.txt (minutes the first time)" >&2
  install -r requirements.txt
  cp requirements.txt "$stamp"
fi
echo "$PWD/$python"
