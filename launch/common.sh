# Functions that the launch scripts share: errors, dry runs, checks of the training command, and the variables that
# hosts get. Sourced, never run.
# shellcheck shell=bash

# Exit status of `dpo-jax train` after it was asked to stop and has saved its state.
# shellcheck disable=SC2034  # the scripts read it
STOPPED=75

# Variables of this environment that every host of a run gets, where they are set. FORWARD names further ones.
FORWARDED=(HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_MODE
    JAX_COMPILATION_CACHE_DIR LIBTPU_INIT_ARGS
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION AWS_DEFAULT_REGION
    AWS_ENDPOINT_URL)

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

without_argument() { # RECIPE: prints it without the argument that may follow its path, as in my.py:fast
    if [[ $1 == *://* ]]; then echo "$1"; else echo "${1%%:*}"; fi
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
    config=$(without_argument "$config")
    [[ $config == /* || $config == *://* || -f $config ]] ||
        refuse "--config=$config" "no such file" "a recipe" "Give for example --config=configs/hh.py."
    [[ -n $workdir ]] || refuse --workdir "not given" "a folder" "Give for example --workdir=/runs/hh."
}

# --- what hosts have ---

forwarded=() # names of the variables that hosts get
mounts=()    # folders that every host has, besides the checkout

check_forward() { # sets `forwarded`, and refuses names in FORWARD that are no variables of this environment
    local variable more=()
    read -ra more <<<"${FORWARD:-}"
    for variable in ${more[@]+"${more[@]}"}; do
        [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -n ${!variable+set} ]] ||
            refuse FORWARD "got '${variable%%=*}'" "names of variables that are set, separated by spaces" \
                "Export it first, or leave it out; FORWARD holds no values."
    done
    for variable in "${FORWARDED[@]}" ${more[@]+"${more[@]}"}; do
        [[ -z ${!variable+set} || " ${forwarded[*]-} " == *" $variable "* ]] || forwarded+=("$variable")
    done
}

absolute_paths() { # TEXT: sets `found` to the absolute paths among its words, other than /
    local word words=()
    found=()
    IFS=$' \t\n;&|()"'"'=" read -rd '' -a words <<<"$1" || true
    for word in ${words[@]+"${words[@]}"}; do
        [[ $word != /?* || " ${found[*]-} " == *" ${word%/} "* ]] || found+=("${word%/}")
    done
}

check_places() { # ARGUMENT...: refuses arguments that name places which the hosts will not have or not share
    # Hosts get every file of the checkout that git does not ignore.
    local argument part parts=()
    for argument in "$@"; do
        case $argument in
            --workdir=* | --config.reference.path=*) check_shared "$argument" "${argument#*=}" ;;
            --config=*) check_place "$argument" "$(without_argument "${argument#*=}")" ;;
            --config.model.path=* | --config.tokenizer.path=* | --config.lora.path=*)
                check_place "$argument" "${argument#*=}"
                ;;
            --config.data.train=* | --config.data.eval=*)
                IFS=, read -ra parts <<<"${argument#*=}"
                for part in ${parts[@]+"${parts[@]}"}; do
                    [[ ! $part =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*=(.*)$ ]] || part=${BASH_REMATCH[1]}   # NAME=DATA
                    [[ ! $part =~ ^(.+)\*[0-9][0-9.eE+-]*$ ]] || part=${BASH_REMATCH[1]} # DATA*WEIGHT
                    check_place "${argument%%=*}=$part" "$part"
                done
                ;;
        esac
    done
}

in_checkout() { # PATH: sets `why` if the hosts do not get this path of the checkout
    if [[ -n $(git ls-files --cached --others --exclude-standard -- "$1" 2>/dev/null) ]]; then
        [[ ! -L $1 || $(readlink "$1") != /* ]] || why="a link to a place outside of the checkout"
    elif compgen -G "$1" >/dev/null; then
        why="not sent, because git ignores it or it is outside of the checkout"
    elif [[ $1 =~ \.(py|ya?ml|jsonl?|csv|parquet)(\.gz|\.zst)?$ || $1 == ../* ]]; then
        why="no such file" # anything else may be an id on the Hub
    fi
}

check_place() { # NAME PATH: refuses a path to read that hosts do not have
    local why=''
    if [[ $2 == /* || $2 == *://* || $2 == '{workdir}'* ]]; then
        check_shared "$1" "$2"
    else
        in_checkout "$2"
        [[ -z $why ]] || refuse "$1" "$why" "a file that the hosts get" \
            "Move it into the checkout, where git does not ignore it, or onto a mounted folder or into a bucket."
    fi
}

check_shared() { # NAME PATH: refuses a path that is not on storage which all hosts share
    local folder
    case $2 in
        gs://?* | s3://?* | '{workdir}' | '{workdir}'/* | '') return ;;
        /*)
            for folder in ${mounts[@]+"${mounts[@]}"}; do
                [[ $2 != "${folder%/}"/?* ]] || return 0
            done
            ;;
    esac
    refuse "$1" "not a place that all hosts share" \
        "a path in a bucket, gs:// or s3://, or in a folder that every host mounts (${mounts[*]:-none})" \
        "Name one there; if hosts have this folder, give MOUNTS=FOLDER."
}
