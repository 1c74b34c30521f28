#!/usr/bin/env bash
# A training on all hosts of a TPU slice, one process per host.
#
#   launch/tpu.sh NAME ZONE --config=configs/lastfm.py --workdir=/mnt/shared/run
#
# NAME is a TPU VM made by gcloud. Each of its hosts needs this project installed at REPO. Data,
# model and workdir must be on storage that all hosts share.
#
#   REPO    folder of the project on the hosts (sdpo_jax, in the home folder)
#   PYTHON  the interpreter on the hosts (python)
set -euo pipefail

if (($# < 3)); then
  echo "error: launch/tpu.sh: found $# arguments, expected NAME ZONE --config=… [--workdir=…]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="\
cd $(printf %q "${REPO:-sdpo_jax}") && \
exec $(printf %q "${PYTHON:-python}") -m sdpo_jax.train --coordinator=auto$arguments"
