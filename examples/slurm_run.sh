#!/bin/bash
# Any dca-jax command on the GPUs of several SLURM nodes, one process a node:
#
#   sbatch examples/slurm_run.sh generate ./Llama-2-70b-hf --file book.txt --mesh context=2,tensor=8
#   sbatch --nodes=4 examples/slurm_run.sh eval perplexity ./Llama-2-70b-hf --text book.txt \
#     --length 128k --mesh context=4,tensor=8
#
# The mesh takes all GPUs: nodes times GPUs a node. Every node must see the model and the texts
# under the same path; results are written by the first node.
#SBATCH --job-name=dca-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

# Under SLURM JAX gives a process one GPU, unless this says which ones are its own.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

# Coordinator, number of processes and each one's id come from SLURM. If one process fails, the
# others end by themselves; --kill-on-bad-exit ends them without waiting for --peer-timeout.
srun --kill-on-bad-exit=1 dca-jax --distributed "$@"
