#!/usr/bin/env bash
# Shared by the experiments' run scripts, which set EXPERIMENT and source it: the command line and its checks, one
# training per optimizer, paths of figures, and the final message.

# Variables of every run script; empty: the config's value.
OPTIMIZERS=${OPTIMIZERS:-olion muon adamuon lion adamw}
LR=${LR:-}                   # peak learning rate of the matrices, for every optimizer
SEED=${SEED:-}
GROUP=${GROUP:-}             # runs/EXPERIMENT/GROUP holds the runs, which the figures show; empty: the config's name
NGPU=${NGPU:-}               # processes on this machine; empty: one per GPU
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}    # node 0 prepares, measures and draws
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0} # host:port of node 0; port 0: a free one, for a single node

refuse() {
  echo "error: $*" >&2
  exit 1
}

# Refuses a variable that is not a whole number: refuse_other_than_numbers LEAST NAME...
# Called before any arithmetic comparison, in which bash would execute commands.
refuse_other_than_numbers() {
  local least=$1 name
  shift
  for name in "$@"; do
    [[ "${!name}" =~ ^(0|[1-9][0-9]{0,6})$ && "${!name}" -ge $least ]] ||
      refuse "$name must be a whole number, $least or more; got '${!name}'"
  done
}

# Reads the command line into CONFIG, GROUP, publish, wants_help and `flags` (the rest), and checks the variables:
# read_arguments DEFAULT_CONFIG "$@"
read_arguments() {
  local argument
  CONFIG=$1
  shift
  if [[ $# -gt 0 && "$1" != -* ]]; then
    CONFIG=$1
    shift
  fi
  GROUP=${GROUP:-$(basename "$CONFIG" .toml)}
  publish="" wants_help="" flags=()
  for argument in "$@"; do
    case $argument in
      --publish) publish=yes ;;
      --group* | --out* | --job.group* | --job.dump?folder*)
        refuse "figures are of runs/$EXPERIMENT/GROUP; set GROUP instead of $argument" ;;
      --help | -h) wants_help=yes ;;
      *) flags+=("$argument") ;;
    esac
  done
  [[ -f "$CONFIG" ]] || refuse "config file not found: $CONFIG (from $PWD); name an existing TOML file"
  read -r -d '' -a optimizers <<<"$OPTIMIZERS" || true # words, without expanding *
  [[ ${#optimizers[@]} -gt 0 ]] || refuse "OPTIMIZERS must name at least one optimizer; got '$OPTIMIZERS'"
  [[ -z "$NGPU" ]] || refuse_other_than_numbers 1 NGPU
  refuse_other_than_numbers 1 NNODES
  refuse_other_than_numbers 0 NODE_RANK
  [[ "$NODE_RANK" -lt "$NNODES" ]] || refuse "NODE_RANK must be below NNODES=$NNODES; got $NODE_RANK"
  # localhost:0, a free local port, works for one node only.
  [[ "$NNODES" -eq 1 || "$RDZV_ENDPOINT" != localhost:0 ]] ||
    refuse "NNODES=$NNODES needs one RDZV_ENDPOINT=host:port on all nodes, the host being one of them"
}

# Sets PYTHON and NGPU, by default one process per GPU: find_processes PROCESSES_WITHOUT_A_GPU
find_processes() {
  PYTHON=$(bash scripts/setup.sh)
  NGPU=${NGPU:-$("$PYTHON" -c "from common.guard import main_guard; from common import gpu
main_guard(lambda: print(gpu.count() or $1))")}
  [[ -z "${OMP_NUM_THREADS:-}" && "$NGPU" -gt 1 ]] || return 0
  # Divides the cores among the processes; torchrun would use one thread each, with a warning.
  local cores
  cores=$("$PYTHON" -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
  export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
}

# True on the node that prepares, measures and draws.
is_first_node() { [[ "$NODE_RANK" -eq 0 ]]; }

# Prints the path of a figure, beside the runs or, with --publish, in images/, which git tracks: picture [NAME]
picture() {
  local name=${1:-}
  if [[ -n "$publish" ]]; then
    echo "images/${EXPERIMENT}_$GROUP${name:+_$name}.png"
  else
    echo "runs/$EXPERIMENT/$GROUP/${name:-curves}.png"
  fi
}

# A signal is passed to the training, which saves and exits; then this script exits. torchrun kills it after this
# timeout, by default 30 s, but a step and a save of a large model take minutes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
stopped=""
child=""
trap 'stopped=yes; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' INT TERM

# Trains on all processes; returns the training's exit status: launch NAME MODULE ARGUMENTS...
launch() {
  local name=$1 launcher=("$PYTHON") status=0
  shift
  if [[ "$NGPU" -gt 1 || "$NNODES" -gt 1 ]]; then
    launcher+=(-m common.torchrun --nproc-per-node "$NGPU" --nnodes "$NNODES" --rdzv-backend c10d
      --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$GROUP-$name")
  fi
  "${launcher[@]}" -m "$@" &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends `wait` before the training ends
    status=0
    wait "$child" || status=$?
  done
  child=""
  [[ -z "$stopped" ]] || exit 143
  return "$status"
}

# Trains with each of OPTIMIZERS, one after the other: train_each MODULE RESUME_FLAG CONFIG ARGUMENTS...
diverged=""
train_each() {
  local module=$1 resume=$2 config=$3 optimizer status began longest=0 number=0
  shift 3
  for optimizer in "${optimizers[@]}"; do
    status=0 began=$SECONDS number=$((number + 1))
    tell_progress "$optimizer" "$number" "$longest"
    # The training's progress bar shows the expected end of all.
    RUNS_AFTER=$((${#optimizers[@]} - number)) launch "$optimizer" "$module" "$config" --optimizer.name "$optimizer" "$@" || status=$?
    longest=$((SECONDS - began > longest ? SECONDS - began : longest))
    case $status in
      0) ;;
      3) diverged+=" $optimizer" ;; # a result, and no reason to skip the others
      *)
        # The launcher's report is long, and a killed process prints nothing: end with the remedy.
        [[ "$NGPU" -eq 1 && "$NNODES" -eq 1 && $status -eq 1 ]] || echo "error: $optimizer ended with status $status:" \
          "see the first error above; the same command with $resume continues from the last checkpoint, on any" \
          "number of GPUs" >&2
        exit "$status"
        ;;
    esac
  done
}

# Prints the current optimizer and the expected end of all, if each takes as long as the longest so far:
# tell_progress OPTIMIZER NUMBER SECONDS_OF_THE_LONGEST
tell_progress() {
  local count=${#optimizers[@]} left end when=""
  if [[ $3 -gt 0 ]]; then
    left=$(($3 * (count - $2 + 1)))
    end=$(($(date +%s) + left))
    when=$(date -d "@$end" +%H:%M 2>/dev/null || date -r "$end" +%H:%M) # GNU's date, or macOS'
    when="; all done at about $when, in $(((left + 59) / 60)) min"
  fi
  echo "optimizer $2 of $count: $1$when" >&2
}

# The final message, below the table and the figure's path.
tell_end() {
  if is_first_node; then echo "runs: runs/$EXPERIMENT/$GROUP"; fi
  [[ -z "$diverged" ]] || echo "diverged:$diverged (see the error above; a lower learning rate helps)" >&2
}
