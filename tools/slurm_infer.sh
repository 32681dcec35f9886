#!/usr/bin/env bash
# Predict under Slurm: bash tools/slurm_infer.sh PARTITION JOB_NAME CONFIG CHECKPOINT INPUT... --out-dir DIR [arguments of tools/infer.py]
set -euo pipefail
if [[ $# -lt 5 ]]; then
    echo "usage: bash tools/slurm_infer.sh PARTITION JOB_NAME CONFIG CHECKPOINT INPUT... --out-dir DIR [arguments of tools/infer.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh"
partition=$1 job=$2
shift 2
run_under_slurm "$partition" "$job" infer.py "$@"
