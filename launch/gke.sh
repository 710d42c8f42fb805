#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster and continues after a preemption. Fills in launch/gke.yaml and applies it.
#
#   launch/gke.sh --config=RECIPE --workdir=/runs/NAME [--config.SECTION.FIELD=VALUE ...]
#
# The arguments are those of `dpo-jax train`. The cluster is the current one of kubectl. It needs JobSet, node pools
# with the given TPU slices, and, unless --workdir is in a bucket (gs:// or s3://), a PersistentVolumeClaim that all
# pods can write to (ReadWriteMany, for example Filestore). The pods mount the claim as /runs. The head of
# launch/gke.yaml describes what is restarted. Before a second run with the same name, and to remove a run:
# kubectl delete jobset,secret NAME.
#
# Of this environment, pods get HF_TOKEN, WANDB_API_KEY, JAX_COMPILATION_CACHE_DIR and the others that FORWARDED in
# launch/common.sh lists, where they are set. They are stored as the Secret NAME. Values are in no command line, in no
# log and not in the manifest of the JobSet.
#
# Variables:
#   NAME             of the JobSet; required
#   IMAGE            container image of this checkout, by launch/Dockerfile; required
#   ACCELERATOR      node label cloud.google.com/gke-tpu-accelerator, such as tpu-v6e-slice; required
#   TOPOLOGY         chips of one slice, such as 4x4; required
#   CLAIM            PersistentVolumeClaim, mounted as /runs; required unless --workdir is in a bucket
#   MOUNTS           folders of IMAGE, separated by spaces, that arguments may name; default: none
#   FORWARD          names of further variables that pods get, separated by spaces; default: none
#   CHIPS_PER_HOST   chips of each host; default 4
#   SLICES           number of slices; default 1
#   MAX_RESTARTS     restarts after failures other than a preemption or a request to stop; default 3
#   DRY_RUN          1: print the filled-in manifest, and the names in the Secret; run nothing; needs no kubectl
#
# To build an image of this checkout with its recipes, at its root:
#   docker build --file=launch/Dockerfile --tag="$IMAGE" . && docker push "$IMAGE"
#
# Example, two slices of 16 chips:
#   export NAME=hh IMAGE=registry.example.com/dpo-jax CLAIM=runs
#   export ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 SLICES=2
#   launch/gke.sh --config=configs/hh.py --workdir=/runs/hh --config.model.path=EleutherAI/pythia-2.8b \
#       --config.mesh.replica=2
#   kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=hh
#
# The same with xpk, after `xpk storage attach --auto-mount=true --mount-point=/runs ...`:
#   xpk workload create --cluster=CLUSTER --workload=hh --docker-image="$IMAGE" --tpu-type=v6e-16 --num-slices=2 \
#       --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
#       --command='dpo-jax train --config=configs/hh.py --workdir=/runs/hh ...'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # the WORKDIR of the image, so that a relative path means the same in both
source launch/common.sh

: "${CHIPS_PER_HOST:=4}" "${SLICES:=1}" "${MAX_RESTARTS:=3}"
check_train "$@"
[[ $workdir == /runs/?* || $workdir == *://* ]] ||
    refuse "--workdir=$workdir" "not on the claim" "a folder in /runs, or in a bucket" \
        "Give for example --workdir=/runs/hh."
check_forward
need NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "at most 40 lower-case letters, digits and dashes" hh
need IMAGE '[A-Za-z0-9._/:@-]+' "a container image" registry.example.com/dpo-jax
need ACCELERATOR '[a-z0-9-]+' "a TPU type as GKE labels its nodes" tpu-v6e-slice
need TOPOLOGY '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "chips in each dimension" 4x4
[[ -z ${CLAIM:-} && $workdir == *://* ]] || need CLAIM '[a-z][a-z0-9.-]*' "a PersistentVolumeClaim" runs
need CHIPS_PER_HOST '[1-9][0-9]*' "a number >= 1" 4
need SLICES '[1-9][0-9]*' "a number >= 1" 2
need MAX_RESTARTS '[0-9]+' "a number >= 0" 3
absolute_paths "${MOUNTS:-}${CLAIM:+ /runs}"
mounts=(${found[@]+"${found[@]}"})
check_places "$@"
chips=$((${TOPOLOGY//x/*}))
((chips % CHIPS_PER_HOST == 0)) ||
    refuse CHIPS_PER_HOST "got $CHIPS_PER_HOST" "a divisor of the $chips chips of $TOPOLOGY" \
        "Give that of the node pool's machine type."
# shellcheck disable=SC2034  # read through its name below
HOSTS=$((chips / CHIPS_PER_HOST))

ARGUMENTS='' # as a JSON list, which is YAML too
for argument in "$@"; do
    argument=${argument//\\/\\\\}
    ARGUMENTS+="${ARGUMENTS:+, }\"${argument//\"/\\\"}\""
done
ARGUMENTS="[$ARGUMENTS]"

VOLUMES='[]' MOUNTED='[]'
if [[ -n ${CLAIM:-} ]]; then
    # shellcheck disable=SC2034  # read through their names below
    VOLUMES="[{name: runs, persistentVolumeClaim: {claimName: $CLAIM}}]" MOUNTED='[{name: runs, mountPath: /runs}]'
fi

manifest=$(<launch/gke.yaml)
for field in NAME MAX_RESTARTS SLICES HOSTS ACCELERATOR TOPOLOGY IMAGE ARGUMENTS CHIPS_PER_HOST VOLUMES MOUNTED; do
    manifest=${manifest//"\${$field}"/"${!field}"}
done

secret() { # prints the manifest of the Secret, for a pipe and no screen
    local variable
    printf '%s\n' 'apiVersion: v1' 'kind: Secret' 'metadata:' "  name: $NAME" 'type: Opaque' 'data:'
    for variable in ${forwarded[@]+"${forwarded[@]}"}; do
        printf '  %s: "%s"\n' "$variable" "$(printf %s "${!variable}" | base64 | tr -d '\n')"
    done
}

# Applied by the server: otherwise kubectl would keep a second copy of the values in an annotation.
apply=(kubectl apply --server-side --force-conflicts --filename=-)
if dry; then
    echo "# $(quote "${apply[@]}"), of a Secret with: ${forwarded[*]-}"
    echo "# kubectl apply --filename=-"
    echo "$manifest"
else
    secret | "${apply[@]}"
    kubectl apply --filename=- <<<"$manifest"
fi
