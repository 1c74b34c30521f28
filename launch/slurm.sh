#!/usr/bin/env bash
# A training over the nodes of a Slurm job: one process per node, with all its GPUs.
#
#   sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh --config=configs/lastfm.py --workdir=DIR
#
# DIR, the data and the model must be on a file system that all nodes share. One process per GPU
# (--ntasks-per-node=4) works as well. JAX finds the other processes by Slurm's variables. Two
# minutes before the time limit a signal makes the run save; the job is then requeued and resumes.
#
#   PYTHON  the interpreter (python)
#SBATCH --job-name=sdpo
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

srun --kill-on-bad-exit=1 --wait=120 "${PYTHON:-python}" -m sdpo_jax.train "$@"
status=$?
if ((status == 75)); then # stopped by a signal, with all saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
