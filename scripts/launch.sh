#!/usr/bin/env bash
# What the experiments' run scripts share; they source it and set CONFIG, NGPU and GROUP.

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}    # node 0 prepares, measures and draws
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0} # host:port of node 0; port 0 takes a free one, for a single node

refuse() {
  echo "error: $*" >&2
  exit 1
}

check_config() {
  [[ -f "$CONFIG" ]] || refuse "config file not found: $CONFIG (from $PWD); name an existing TOML file"
}

# Several nodes need a meeting point; localhost:0, a free port here, serves one.
check_nodes() {
  [[ "$NNODES" -eq 1 || "$RDZV_ENDPOINT" != localhost:0 ]] ||
    refuse "NNODES=$NNODES needs one RDZV_ENDPOINT=host:port on all nodes, the host being one of them"
}

# Shares the cores among the processes of this machine; torchrun would take one thread each, and say so.
share_cores() {
  [[ -z "${OMP_NUM_THREADS:-}" && "$NGPU" -gt 1 ]] || return 0
  local cores
  cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
  export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
}

# A signal reaches the training, which saves and leaves; then this script leaves too. torchrun would kill it after 30 s,
# but a step and a save of a large model take minutes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
stopped=""
child=""
trap 'stopped=yes; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' INT TERM

# Trains on all processes; returns the status of the training: launch NAME MODULE ARGUMENTS...
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
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends `wait` before the training has ended
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
  local module=$1 resume=$2 config=$3 optimizer status
  shift 3
  for optimizer in $OPTIMIZERS; do
    status=0
    launch "$optimizer" "$module" "$config" --optimizer.name "$optimizer" "$@" || status=$?
    case $status in
      0) ;;
      3) diverged+=" $optimizer" ;; # the training's word for it: a result, and no reason to skip the others
      *)
        # The launcher's report is long, and a process that was killed says nothing: end on what to do.
        [[ "$NGPU" -eq 1 && "$NNODES" -eq 1 && $status -eq 1 ]] || echo "error: $optimizer ended with status $status:" \
          "see the first error above; the same command with $resume goes on from the last checkpoint, on any number" \
          "of GPUs" >&2
        exit "$status"
        ;;
    esac
  done
}

# The last words of a script.
tell_diverged() {
  [[ -z "$diverged" ]] || echo "diverged:$diverged (see the error above; a lower learning rate helps)" >&2
}
