#!/usr/bin/env bash
# Test in several processes: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/_torchrun.sh"
if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
run_on "$gpus" "$here/test.py" "$config" "$checkpoint" "$@"
