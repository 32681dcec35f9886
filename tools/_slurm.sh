# Sourced by slurm_*.sh: srun with mmseg's environment variables.
# GPUS in all, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS (further options of srun, split at spaces).

run_under_slurm() { # run_under_slurm PARTITION JOB TOOL ARGUMENTS...
    local partition=$1 job=$2 tool=$3
    shift 3
    local gpus=${GPUS:-4} per_node=${GPUS_PER_NODE:-4} further=()
    read -r -a further <<<"${SRUN_ARGS:-}"
    exec srun --partition "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" \
        --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 "${further[@]}" \
        "${PYTHON:-python}" -u "$(dirname "${BASH_SOURCE[0]}")/$tool" "$@" --launcher slurm
}
