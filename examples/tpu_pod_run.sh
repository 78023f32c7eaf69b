#!/bin/bash
# Any dca-jax command on all hosts of a TPU slice on Google Cloud, started from your own machine:
#
#   bash examples/tpu_pod_run.sh my-tpu us-central2-b generate ./llama2-70b --file book.txt \
#     --mesh context=4,tensor=8
#
# The mesh takes all chips of the slice. Before, once, where ADDRESS is this repository's:
#
#   gcloud compute tpus tpu-vm ssh my-tpu --zone us-central2-b --worker=all \
#     --command "git clone ADDRESS dca_jax && pip install './dca_jax[tpu]'"
#
# and the model and the texts under the same path on every host: a mounted bucket or NFS, or copied
# by `gcloud compute tpus tpu-vm scp --worker=all`. Results are written by the first host.

set -euo pipefail

if (($# < 3)); then
  echo "usage: $0 TPU ZONE COMMAND [ARGUMENTS]   (COMMAND is one of dca-jax)" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# Each host finds the others, and its own number, in the slice's metadata.
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "$(printf '%q ' dca-jax --distributed "$@")"
