#!/usr/bin/env bash
# Predict in several processes: bash tools/dist_infer.sh CONFIG CHECKPOINT GPUS INPUT... --out-dir DIR [arguments of tools/infer.py]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/_torchrun.sh"
if [[ $# -lt 4 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash tools/dist_infer.sh CONFIG CHECKPOINT GPUS INPUT... --out-dir DIR [arguments of tools/infer.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
run_on "$gpus" "$here/infer.py" "$config" "$checkpoint" "$@"
