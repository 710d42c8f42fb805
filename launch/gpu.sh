#!/usr/bin/env bash
# Trains on this machine with all of its GPUs and continues after the run was asked to stop.
#
#   launch/gpu.sh --config=RECIPE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#
# The arguments are those of `dpo-jax train`. If the run gets SIGTERM, it saves its state and exits with status 75. This
# script then runs the same command again, which continues from the saved state. With any other status the script exits
# with that status. SIGTERM or Ctrl-C to this script is passed on to the run, and nothing is restarted after it.
#
# The run has all variables of this environment, such as HF_TOKEN and WANDB_API_KEY.
#
# Variables:
#   CUDA_VISIBLE_DEVICES   GPUs to use, for example 0,1; default: all
#   DRY_RUN                1: print the command and run nothing
#
# Example:
#   launch/gpu.sh --config=configs/hh.py --workdir=runs/hh --config.model.path=EleutherAI/pythia-2.8b
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
check_train "$@"

command=(dpo-jax train "$@")
if dry; then
    quote "${command[@]}"
    echo "# after status $STOPPED: the same again"
    exit
fi

signals=0 child=''
# The run is a background job, because bash handles a signal only after a foreground command has ended.
trap 'signals=$((signals + 1)); [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
while :; do
    "${command[@]}" &
    child=$!
    while :; do # a signal ends `wait` early, with a status that is not that of the run
        seen=$signals status=0
        wait "$child" || status=$?
        ((seen != signals)) || break
    done
    ((status == STOPPED && signals == 0)) || exit "$status"
    echo "stopped with its state saved: going on" >&2
done
