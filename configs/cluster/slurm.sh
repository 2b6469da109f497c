#!/bin/bash
# Two nodes of four GPUs: sbatch configs/cluster/slurm.sh PEFT=lora MODEL=llama-7b DATA=orders.jsonl batch.size=32
# One task a node; each starts the processes of its own GPUs. The repository and its runs/ must lie on storage that all see.
#SBATCH --job-name=afinar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
# Five minutes before the time is up the run saves and leaves; then it goes back into the queue and resumes.
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -u
cd "$SLURM_SUBMIT_DIR" || exit 2
export MASTER_ADDR
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The port follows from the job's number, so two jobs on one node do not collide.
# The first node to leave must not have the others killed while they save. Newer srun forgets the cores of the job.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '.venv/bin/python -m launcher train NGPU=4 RUN=afinar-'"$SLURM_JOB_NAME"' \
  NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID MASTER_ADDR=$MASTER_ADDR "$@"' afinar "$@"
code=$?
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
