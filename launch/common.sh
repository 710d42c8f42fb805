# Functions that the launch scripts share: errors, dry runs and checks of the training command. Sourced, never run.
# shellcheck shell=bash

# Exit status of `dpo-jax train` after it was asked to stop and has saved its state.
# shellcheck disable=SC2034  # the scripts read it
STOPPED=75

refuse() { # PLACE GOT EXPECTED REMEDY: prints one line and exits with status 2, as dpo-jax does
    echo "error: $1: $2; expected $3. $4" >&2
    exit 2
}

dry() { [[ ${DRY_RUN:-0} != 0 ]]; }

quote() { # prints its arguments as one line that a shell splits into the same arguments
    local word line='' apostrophe="'\\''"
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//"'"/$apostrophe}'"
        line+="$word "
    done
    printf '%s\n' "${line% }"
}

step() { # runs a command, or prints it in a dry run
    if dry; then quote "$@"; else "$@"; fi
}

need() { # VARIABLE PATTERN EXPECTED EXAMPLE: refuses a variable that is unset or does not match the pattern
    [[ -n ${!1:-} ]] || refuse "$1" "not given" "$3" "Give for example $1=$(quote "$4")."
    [[ ${!1} =~ ^($2)$ ]] || refuse "$1" "got '${!1}'" "$3" "Give for example $1=$(quote "$4")."
}

check_train() { # checks the arguments of `dpo-jax train` as far as this needs no Python, and sets `workdir`
    local argument config=''
    workdir=''
    for argument in "$@"; do
        case $argument in
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
            --*) ;;
            *) refuse "command line" "unexpected '$argument'" "only --flag=value" "See dpo-jax --help." ;;
        esac
    done
    [[ -n $config ]] || refuse --config "not given" "a recipe" "Give for example --config=configs/hh.py."
    [[ $config == /* || -f ${config%%:*} ]] ||
        refuse "--config=$config" "no such file" "a recipe" "Give for example --config=configs/hh.py."
    [[ -n $workdir ]] || refuse --workdir "not given" "a folder" "Give for example --workdir=/runs/hh."
}
