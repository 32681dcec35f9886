# Sourced by dist_*.sh: torchrun with mmseg's environment variables.
# NNODES, NODE_RANK, MASTER_ADDR and PORT describe several machines; on a single one a free port is found by itself.
# PYTHON chooses the interpreter.

run_on() { # run_on GPUS TOOL ARGUMENTS...
    local processes=$1 tool=$2
    shift 2
    local python=${PYTHON:-python}
    local meeting=(--standalone)
    if [[ ${NNODES:-1} -gt 1 || -n ${PORT:-} ]]; then
        meeting=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
    fi
    # Processes on one machine share its cores.
    local cores=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
    exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" "$tool" "$@" --launcher pytorch
}
