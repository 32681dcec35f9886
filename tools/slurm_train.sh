#!/usr/bin/env bash
# Train under Slurm: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
set -euo pipefail
if [[ $# -lt 3 ]]; then
    echo "usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh"
partition=$1 job=$2
shift 2
run_under_slurm "$partition" "$job" train.py "$@"
