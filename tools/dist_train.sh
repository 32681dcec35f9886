#!/usr/bin/env bash
# Train in several processes: bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/_torchrun.sh"
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
run_on "$gpus" "$here/train.py" "$config" "$@"
