#!/usr/bin/env bash
# Test under Slurm: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
set -euo pipefail
if [[ $# -lt 4 ]]; then
    echo "usage: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh"
partition=$1 job=$2
shift 2
run_under_slurm "$partition" "$job" test.py "$@"
