#!/bin/bash
# One recipe on several hosts under Slurm: sbatch --nodes 4 examples/cluster/slurm.sh goods.yaml [key=value ...]
# Not run by the tests: it takes a cluster. The output directory has to be on a file system that all hosts share.
#SBATCH --job-name=openm6
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# A new store for every start: the addresses of processes that have died are not asked for again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a host, one process a GPU. A process that dies takes its round down; torchrun starts the next round on the
# same hosts, and the run goes on from its last whole checkpoint, as it does when Slurm requeues the job.
srun --kill-on-bad-exit=0 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --max-restarts "${MAX_RESTARTS:-20}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${RDZV_PORT:-29500}" \
  --no-python openm6 train "$@"
