#!/usr/bin/env bash
# Trains on this machine with all of its GPUs, and goes on after the run was asked to stop.
#
#   launch/gpu.sh --config=RECIPE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#
# The arguments are those of `dpo-jax train`. A run that gets SIGTERM saves its state and leaves with status 75: the
# same command is then run again and goes on from there. Any other status ends this script with it. SIGTERM or Ctrl-C to
# this script goes to the run, and after it nothing is started again.
#
# Variables:
#   CUDA_VISIBLE_DEVICES   GPUs to use, such as 0,1; default: all
#   DRY_RUN                1: print the command, run nothing
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
# In the background, because bash would otherwise hold a signal back until the run has ended.
trap 'signals=$((signals + 1)); [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
while :; do
    "${command[@]}" &
    child=$!
    while :; do # a signal ends `wait` early, with a status that is not the run's
        seen=$signals status=0
        wait "$child" || status=$?
        ((seen != signals)) || break
    done
    ((status == STOPPED && signals == 0)) || exit "$status"
    echo "stopped with its state saved: going on" >&2
done
