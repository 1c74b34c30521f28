#!/usr/bin/env bash
# One machine with all its GPUs, in one process.
#
#   launch/gpu.sh --config=configs/lastfm.py --workdir=runs/lastfm/run
#
# Without a working CUDA build of JAX it ends at once, and never goes on on the CPU. The first lines
# tell how many devices there are. CUDA_VISIBLE_DEVICES=0,1 takes some of them; how the model lies
# on them is --config.mesh.{data,fsdp,tensor}.
#
#   PYTHON  the interpreter (python)
set -euo pipefail

export JAX_PLATFORMS=cuda
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "${PYTHON:-python}" -m sdpo_jax.train "$@"
