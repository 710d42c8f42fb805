#!/usr/bin/env bash
#SBATCH --job-name=dpo-jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains on the GPU nodes of a SLURM cluster and continues after a time limit or a preemption.
#
#   sbatch [--nodes=N ...] launch/slurm.sh --config=RECIPE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#
# Submit it from the root of the checkout, with dpo-jax on PATH. The arguments are those of `dpo-jax train`. DIR must be
# on a file system that all nodes share. Options of sbatch override the lines above. The processes find one another
# through SLURM. Each one uses the GPU whose number is its number on the node, so --ntasks-per-node must equal
# --gpus-per-node. (On one node a single task is enough: it uses all GPUs.)
#
# 120 s before the time limit, SLURM sends SIGTERM to the tasks (not to this script, because --signal has no `B:`). They
# save their state and exit with status 75, and this script queues the job again under the same number. A large model
# may need more time: sbatch --signal=TERM@600. A job that is preempted with PreemptMode=REQUEUE is queued again by
# SLURM. With any other status the job ends with that status. scancel ends it for good.
#
# Variables:
#   FORWARD   names of variables that must be set in the job, separated by spaces; default: none. All variables of the
#             job reach the tasks. sbatch hands those of your shell to the job, such as HF_TOKEN and WANDB_API_KEY,
#             unless it is called with --export or SBATCH_EXPORT is set
#   DRY_RUN   1: print the commands and run nothing; needs no SLURM
#
# Example, 4 nodes of 8 GPUs, a day at a time:
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh --config=configs/hh.py --workdir=/shared/runs/hh \
#       --config.model.path=EleutherAI/pythia-2.8b
set -euo pipefail
# SLURM runs a copy of this file in another folder.
here=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/launch}
here=${here:-$(dirname "${BASH_SOURCE[0]}")}
if [[ ! -r $here/common.sh ]]; then
    echo "error: $here/common.sh: not found; expected a submission from the root of the checkout. cd there first." >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$here/common.sh"
check_train "$@"
check_forward
dry || [[ -n ${SLURM_JOB_ID:-} ]] ||
    refuse SLURM_JOB_ID "not set" "to run inside a SLURM job" "Submit it: sbatch launch/slurm.sh --config=..."
tasks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_ON_NODE:-}
[[ ${SLURM_NTASKS:-} == 1 || -z $tasks || -z $gpus || $tasks == "$gpus" ]] ||
    refuse --ntasks-per-node "got $tasks with $gpus GPUs on a node" "one task for each GPU" \
        "Submit with sbatch --ntasks-per-node=$gpus --gpus-per-node=$gpus."

# A finished task must not end tasks that still save or export, whatever KillOnBadExit and WaitTime the cluster has.
# Without GPU binding, each task sees all GPUs of its node and selects its own. srun does not inherit --cpus-per-task.
# Tasks get the variables of this script also where sbatch was told to export some or none.
command=(srun --kill-on-bad-exit=0 --wait=0 --gpu-bind=none --export=ALL
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} dpo-jax train "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
status=0
step "${command[@]}" || status=$? # the highest status of all tasks
if dry; then
    echo "# after status $STOPPED: $(quote "${requeue[@]}")"
elif ((status == STOPPED)); then
    echo "stopped with its state saved: queueing job $SLURM_JOB_ID again" >&2
    exec "${requeue[@]}"
fi
exit "$status"
