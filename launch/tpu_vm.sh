#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on one slice or several, and continues after a preemption.
#
#   launch/tpu_vm.sh run --config=RECIPE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
#   launch/tpu_vm.sh create | status | delete
#
# `run` copies this checkout (every file that git does not ignore) to all hosts, installs it, and runs `dpo-jax train`
# with the given arguments on each host, in ~/dpo_jax. It creates the queued resource NAME if there is none, as `create`
# does. The disks of TPU VMs are deleted with the VMs, so DIR must be on permanent storage that all hosts share: a
# bucket (gs:// or s3://), or what SETUP mounts. The same holds for data and models that are not in the checkout. Paths
# that the hosts will not have are refused before anything is created. Hosts and slices find one another through the
# metadata of the queued resource.
#
# Of this environment, hosts get HF_TOKEN, WANDB_API_KEY, JAX_COMPILATION_CACHE_DIR and the others that FORWARDED in
# launch/common.sh lists, where they are set. They are sent as a file that only the user can read and that each host
# removes when it has read it, before every start. Values are in no command line and in no log.
#
# A run that is asked to stop exits with status 75 and is started again. If the TPUs are taken away (the queued resource
# is SUSPENDED or FAILED), it is deleted and created again, and the same command is run. With any other failure this
# script exits with its status. The TPUs exist until `delete`, also after success. Interrupting this script does not
# stop the run.
#
# Variables:
#   NAME               name of the queued resource and of its nodes; required
#   ZONE               zone of Google Cloud; required
#   ACCELERATOR_TYPE   type and size of one slice, for example v6e-16; required by create and run
#   SETUP              shell command that mounts the storage, run once after each start; required by create and run;
#                      true: nothing to mount, because all is in buckets
#   MOUNTS             folders, separated by spaces, that hosts have besides those that SETUP names; default: none
#   FORWARD            names of further variables that hosts get, separated by spaces; default: none
#   SLICES             number of slices; default 1
#   SPOT               1: spot capacity, which can be preempted; default 0
#   CREATE_OPTIONS     further options of `queued-resources create`, for example --reserved; default: none
#   RUNTIME_VERSION    image of the VMs; default: the one for ACCELERATOR_TYPE
#   PROJECT            project of Google Cloud; default: that of gcloud
#   EXTRAS             extras of the package to install; default tpu. Those that paths at gs:// or s3:// need are added
#   POLL_S             seconds between two queries of the queued resource; default 60
#   DRY_RUN            1: print the commands and run nothing; needs no gcloud
#
# If a slice has several hosts, gcloud needs the key in an SSH agent: ssh-add ~/.ssh/google_compute_engine
#
# Example, two slices of 16 chips and an NFS share as /runs:
#   export NAME=hh ZONE=us-east5-b ACCELERATOR_TYPE=v6e-16 SLICES=2 SPOT=1
#   export SETUP='sudo apt-get install -y nfs-common && sudo mkdir -p /runs && sudo mount 10.0.0.2:/runs /runs'
#   launch/tpu_vm.sh run --config=configs/hh.py --workdir=/runs/hh --config.model.path=EleutherAI/pythia-2.8b \
#       --config.mesh.replica=2
#   launch/tpu_vm.sh delete
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # so that a relative path means the same here and on the hosts
source launch/common.sh

action=${1:-}
[[ $# -eq 0 ]] || shift
: "${SLICES:=1}" "${SPOT:=0}" "${EXTRAS:=tpu}" "${POLL_S:=60}" "${CREATE_OPTIONS:=}"
case $action in
    run)
        check_train "$@"
        check_forward
        [[ $* != *gs://* || ,$EXTRAS, == *,gcs,* ]] || EXTRAS+=,gcs
        [[ $* != *s3://* || ,$EXTRAS, == *,s3,* ]] || EXTRAS+=,s3
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
    absolute_paths "$SETUP ${MOUNTS:-}"
    mounts=(${found[@]+"${found[@]}"})
    check_places "$@"
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
# All hosts at once. By default gcloud runs groups of 64, and the first group would wait for the others forever.
everywhere=(--node=all --worker=all --batch-size=all)
private=./dpo_jax_private # folder in the home of each host that only its user can read

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

look() { # sets `state` to that of the queued resource; in a dry run to ABSENT, and after that to ACTIVE
    # Not `describe`, which fails in the same way if there is no such resource and if gcloud has no connection.
    local list=("${queued[@]}" list "${where[@]}" "--filter=name~/$NAME\$" "--format=value(state.state)")
    if dry; then
        quote "${list[@]}"
        if [[ -z ${state:-} ]]; then state=ABSENT; else state=ACTIVE; fi
    else
        state=$("${list[@]}")
        state=${state:-ABSENT}
    fi
}

make_ready() { # brings the queued resource from any state to ACTIVE
    local new=''
    look
    until [[ $state == ACTIVE ]]; do
        # A new resource that fails or disappears before it was active would do so again.
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

install() { # with uv, because the Python of the image may be too old
    local archive=build/$NAME.tgz ready=/dev/shm/dpo_jax_setup # a restart of the VM empties it, as it removes mounts
    local files="git ls-files -z --cached --others --exclude-standard"
    step mkdir -p build &&
        step bash -o pipefail -c "$files | tar -czf $archive --null -T -" &&
        step "${queued[@]}" scp "$archive" "$NAME:dpo_jax.tgz" "${where[@]}" "${everywhere[@]}" &&
        on_hosts "[ -e $ready ] || ( $SETUP ) && touch $ready" &&
        on_hosts "mkdir -p dpo_jax && tar -xzf dpo_jax.tgz -C dpo_jax && python3 -m pip install --quiet --user uv \
&& python3 -m uv venv --quiet --allow-existing --python=3.12 venv \
&& python3 -m uv pip install --quiet --python=venv/bin/python --editable='./dpo_jax[$EXTRAS]' \
&& mkdir -p $private && chmod 700 $private"
}

send_environment() { # as a file, because a command line is visible to other users and in logs
    local variable status=0
    if dry; then
        sent=ENVIRONMENT
        echo "# $sent: ${forwarded[*]-}"
    else
        sent=$(mktemp) # readable by this user only
        trap 'rm -f "$sent"' EXIT
        for variable in ${forwarded[@]+"${forwarded[@]}"}; do
            printf 'export %s=%s\n' "$variable" "$(quote "${!variable}")"
        done >"$sent"
    fi
    step "${queued[@]}" scp "$sent" "$NAME:$private/environment" "${where[@]}" "${everywhere[@]}" || status=$?
    dry || rm "$sent"
    return "$status"
}

train() { # returns if it must be called again, exits otherwise
    local status=0 read=". $private/environment && rm $private/environment"
    make_ready
    { install && send_environment && on_hosts "$read && cd dpo_jax && ../venv/bin/dpo-jax train $(quote "$@")"; } ||
        status=$?
    ((status != 0)) || exit 0
    sleep "$POLL_S" # the state shows a preemption a little later than the run does
    look
    case $state in
        SUSPENDING | SUSPENDED | FAILED) ;;
        ACTIVE) ((status == STOPPED)) || exit "$status" ;;
        *) exit "$status" ;; # deleted by hand: do not create it again
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
