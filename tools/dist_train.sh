#!/usr/bin/env bash
# Train in several processes: bash tools/dist_train.sh CONFIG GPUS [--max-restarts K] [arguments of tools/train.py]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/_torchrun.sh"
usage() {
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [--max-restarts K] [arguments of tools/train.py]" >&2
    echo "       NNODES: a number of machines, or a range such as 1:4" >&2
    exit 2
}
[[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ && ${NNODES:-1} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || usage
config=$1 gpus=$2 restarts='' arguments=()
shift 2
while [[ $# -gt 0 ]]; do
    case $1 in
    --max-restarts) restarts=${2:-none} && shift ;;
    --max-restarts=*) restarts=${1#*=} ;;
    *) arguments+=("$1") ;;
    esac
    shift || usage
done
[[ $restarts =~ ^[0-9]*$ ]] || usage
command=("$gpus" "$here/train.py" "$config" "${arguments[@]}")
if [[ -n $restarts || ${NNODES:-1} == *:* ]]; then
    # Every start goes on from the newest checkpoint of the work dir: one that is named would be taken by none.
    if [[ " ${arguments[*]} " =~ ' --resume'(=|' '[^-]) ]]; then
        echo "--resume CHECKPOINT does not go with restarts: copy the checkpoint into the work dir instead" >&2
        exit 2
    fi
    run_with_restarts "${restarts:-3}" "${command[@]}"
fi
run_on "${command[@]}"
