#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on one slice or several, and goes on after a preemption.
#
#   launch/tpu_vm.sh run --config=RECIPE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#   launch/tpu_vm.sh create | status | delete
#
# run copies this checkout (every file that git does not ignore) to all hosts, installs it and runs `dpo-jax train` with
# the given arguments on each, in ~/dpo_jax. The queued resource NAME is created where there is none, as by `create`.
# The disks of TPU VMs go with them: DIR must be on storage that all hosts share and that outlives them, which SETUP
# mounts. Hosts and slices find one another through the metadata that a queued resource gives its VMs.
#
# A run that was asked to stop leaves with status 75 and is run again. Where the TPUs were taken away (the queued
# resource is SUSPENDED or FAILED), they are deleted, created again and the same command is run. Any other failure ends
# this script with its status. The TPUs stay until `delete`, after success too. Interrupting this script does not stop
# the run.
#
# Variables:
#   NAME               of the queued resource and of its nodes; required
#   ZONE               required
#   ACCELERATOR_TYPE   of one slice, such as v6e-16; required by create and run
#   SETUP              shell command that a host runs once after each start, to mount; required by create and run
#   SLICES             how many slices; default 1
#   SPOT               1: spot capacity, which can be taken away; default 0
#   CREATE_OPTIONS     more options of `queued-resources create`, such as --reserved; default none
#   RUNTIME_VERSION    image of the VMs; default: the one for ACCELERATOR_TYPE
#   PROJECT            default: gcloud's own
#   EXTRAS             extras of the package to install; default tpu
#   POLL_S             seconds between two looks at the queued resource; default 60
#   DRY_RUN            1: print the commands, run nothing; needs no gcloud
#
# Where a slice has several hosts, gcloud wants the key in an agent: ssh-add ~/.ssh/google_compute_engine
#
# Example, two slices of 16 chips and an NFS share as /runs:
#   export NAME=hh ZONE=us-east5-b ACCELERATOR_TYPE=v6e-16 SLICES=2 SPOT=1
#   export SETUP='sudo apt-get install -y nfs-common && sudo mkdir -p /runs && sudo mount 10.0.0.2:/runs /runs'
#   launch/tpu_vm.sh run --config=configs/hh.py --workdir=/runs/hh --config.model.path=EleutherAI/pythia-2.8b \
#       --config.mesh.replica=2
#   launch/tpu_vm.sh delete
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # a relative path is then the same here and on the hosts
source launch/common.sh

action=${1:-}
[[ $# -eq 0 ]] || shift
: "${SLICES:=1}" "${SPOT:=0}" "${EXTRAS:=tpu}" "${POLL_S:=60}" "${CREATE_OPTIONS:=}"
case $action in
    run)
        check_train "$@"
        [[ $workdir == /* ]] || refuse "--workdir=$workdir" "not an absolute path" "a folder on what SETUP mounts" \
            "Give for example --workdir=/runs/hh."
        ;;
    create | status | delete)
        [[ $# -eq 0 ]] || refuse "command line" "unexpected '$1'" "nothing after $action" "Only run takes arguments."
        ;;
    *) refuse "command line" "got '$action'" "run, create, status or delete" "See the head of launch/tpu_vm.sh." ;;
esac
need NAME '[a-z]([-a-z0-9]*[a-z0-9])?' "lower-case letters, digits and dashes" hh
need ZONE '[-a-z0-9]+' "a zone with TPUs" us-east5-b
if [[ $action == run || $action == create ]]; then
    need ACCELERATOR_TYPE 'v[-a-z0-9]+' "type and size of a slice" v6e-16
    need SETUP '.+' "a shell command that mounts what --workdir is on" "sudo mount 10.0.0.2:/runs /runs"
    need SLICES '[1-9][0-9]*' "a number >= 1" 2
    need SPOT '[01]' "0 or 1" 1
    need POLL_S '[0-9]+' "seconds" 60
    if [[ -z ${RUNTIME_VERSION:-} ]]; then
        case $ACCELERATOR_TYPE in
            v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
            v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
            v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
            v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
            *) refuse RUNTIME_VERSION "not given" "an image for $ACCELERATOR_TYPE" "See Cloud TPU's list of images." ;;
        esac
    fi
fi

queued=(gcloud compute tpus queued-resources)
where=("--zone=$ZONE")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")
# All hosts at once: gcloud's default is groups of 64, of which the first would wait for the others for ever.
everywhere=(--node=all --worker=all --batch-size=all)

create() {
    local options=("--node-id=$NAME") more
    ((SLICES == 1)) || options=("--node-count=$SLICES" "--node-prefix=$NAME")
    ((SPOT == 0)) || options+=(--spot)
    read -ra more <<<"$CREATE_OPTIONS"
    step "${queued[@]}" create "$NAME" "${where[@]}" "--accelerator-type=$ACCELERATOR_TYPE" \
        "--runtime-version=$RUNTIME_VERSION" "${options[@]}" ${more[@]+"${more[@]}"}
}

delete() { step "${queued[@]}" delete "$NAME" "${where[@]}" --force --quiet; }

on_hosts() { step "${queued[@]}" ssh "$NAME" "${where[@]}" "${everywhere[@]}" "--command=$1"; }

look() { # sets `state` to that of the queued resource; a dry run finds none, and once it is created an active one
    # Not `describe`, which fails alike when there is no such resource and when gcloud cannot ask.
    local list=("${queued[@]}" list "${where[@]}" "--filter=name~/$NAME\$" "--format=value(state.state)")
    if dry; then
        quote "${list[@]}"
        if [[ -z ${state:-} ]]; then state=ABSENT; else state=ACTIVE; fi
    else
        state=$("${list[@]}")
        state=${state:-ABSENT}
    fi
}

make_ready() { # brings the queued resource to ACTIVE from whatever state it is in
    local new=''
    look
    until [[ $state == ACTIVE ]]; do
        # What fails or goes before it ever was active would do so again.
        [[ -z $new || ($state != FAILED && $state != ABSENT) ]] || {
            echo "error: queued resource $NAME: $state; expected ACTIVE. See launch/tpu_vm.sh status." >&2
            exit 1
        }
        case $state in
            ABSENT)
                create
                new=1
                ;;
            SUSPENDED | FAILED)
                delete
                new=''
                ;;
            *) sleep "$POLL_S" ;;
        esac
        look
    done
}

install() { # uv, because the images' own Python may be too old
    local archive=build/$NAME.tgz ready=/dev/shm/dpo_jax_setup # which a restart of the VM empties, as it does mounts
    local files="git ls-files -z --cached --others --exclude-standard"
    step mkdir -p build &&
        step bash -o pipefail -c "$files | tar -czf $archive --null -T -" &&
        step "${queued[@]}" scp "$archive" "$NAME:dpo_jax.tgz" "${where[@]}" "${everywhere[@]}" &&
        on_hosts "[ -e $ready ] || ( $SETUP ) && touch $ready" &&
        on_hosts "mkdir -p dpo_jax && tar -xzf dpo_jax.tgz -C dpo_jax && python3 -m pip install --quiet --user uv \
&& python3 -m uv venv --quiet --allow-existing --python=3.12 venv \
&& python3 -m uv pip install --quiet --python=venv/bin/python --editable='./dpo_jax[$EXTRAS]'"
}

train() { # returns where it is to be called again
    local status=0
    make_ready
    { install && on_hosts "cd dpo_jax && ../venv/bin/dpo-jax train $(quote "$@")"; } || status=$?
    ((status != 0)) || exit 0
    sleep "$POLL_S" # a preemption shows in the state a little later than in the run
    look
    case $state in
        SUSPENDING | SUSPENDED | FAILED) ;;
        ACTIVE) ((status == STOPPED)) || exit "$status" ;;
        *) exit "$status" ;; # deleted by hand, so that it is not to come back
    esac
    echo "the run left with status $status and the queued resource is $state: going on" >&2
}

case $action in
    status) step "${queued[@]}" describe "$NAME" "${where[@]}" ;;
    delete) delete ;;
    create)
        make_ready
        install
        ;;
    run) while :; do train "$@"; done ;;
esac
