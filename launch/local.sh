#!/usr/bin/env bash
# One training in N processes on this machine, each with its share of the GPUs, or on the CPU.
#
#   launch/local.sh N --config=configs/quickstart.py:smoke --workdir=runs/smoke
#
# On one machine a single process with all GPUs (launch/gpu.sh) is as fast; this script tests a run
# of many hosts on one. Ctrl-C and SIGTERM save and stop all. If one process dies, the others are
# killed GRACE seconds later; the same command resumes from the last checkpoint.
#
#   PYTHON       the interpreter (python)
#   CPU_DEVICES  simulated devices of each process, on a machine without GPUs (1)
#   GRACE        seconds before the other processes are killed (10)
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: launch/local.sh: found '${1:-}', expected the number of processes: launch/local.sh N --config=…" >&2
  exit 2
fi
processes=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if ((gpus > 0 && gpus % processes)); then
  echo "error: launch/local.sh: found $gpus GPUs and N = $processes, expected a divisor of $gpus: change N" >&2
  exit 2
fi

pids=()
stopping=0
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

for ((i = 0; i < processes; i++)); do
  if ((gpus > 0)); then
    each=$((gpus / processes))
    CUDA_VISIBLE_DEVICES=$(seq -s, $((i * each)) $(((i + 1) * each - 1)))
    export CUDA_VISIBLE_DEVICES
  else
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${CPU_DEVICES:-1}"
  fi
  "$python" -m sdpo_jax.train --coordinator="localhost:$port" --processes="$processes" \
    --process="$i" "$@" &
  pids+=($!)
done

# Polls twice per second, so that a trap never waits for a process that does not end.
status=0 waited=0 left=("${pids[@]}")
while ((${#left[@]})); do
  sleep 0.5
  alive=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    ((status)) || status=$code
  done
  left=("${alive[@]}")
  if ((status && status != 75 && !stopping && ${#left[@]} && waited++ >= 2 * ${GRACE:-10})); then
    kill -KILL "${left[@]}" 2>/dev/null || true
  fi
done
exit "$status"
