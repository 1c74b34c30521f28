#!/usr/bin/env bash
# One machine with all its GPUs, in one process.
#
#   launch/gpu.sh --config=configs/lastfm.py --workdir=runs/lastfm/run
#
# Without a working CUDA build of JAX it fails at once instead of running on the CPU. The first lines
# report the number of devices. CUDA_VISIBLE_DEVICES=0,1 selects some of them;
# --config.mesh.{data,fsdp,tensor} arranges them.
#
#   PYTHON  the interpreter (python)
set -euo pipefail

export JAX_PLATFORMS=cuda
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "${PYTHON:-python}" -m sdpo_jax.train "$@"
