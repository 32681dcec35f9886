# Sourced by dist_*.sh: torchrun with mmseg's environment variables.
# NNODES, NODE_RANK, MASTER_ADDR and PORT describe several machines; on a single one a free port is found by itself.
# PYTHON chooses the interpreter.

run_on() { # run_on GPUS TOOL ARGUMENTS...
    local processes=$1
    shift
    set_meeting
    start_processes "$processes" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" "$@"
}

# Training: with our own agent, whose exit code says whether to start again, and which starts again by itself
# (docs/training.md). RESTARTS is how often; where it is empty, a failure ends the job, but for NNODES=MIN:MAX.
train_on() { # train_on RESTARTS GPUS TOOL ARGUMENTS...
    local restarts=$1 processes=$2 further=()
    shift 2
    if [[ ${NNODES:-1} == *:* || -n $restarts ]]; then
        set_elastic_meeting
        meeting+=(--max-restarts "${restarts:-3}")
        further=(--resume)
    else
        set_meeting
    fi
    start_processes "$processes" "$(dirname "${BASH_SOURCE[0]}")/_elastic.py" "${meeting[@]}" \
        --nproc-per-node "$processes" "$@" "${further[@]}"
}

set_meeting() {
    meeting=(--standalone)
    if [[ ${NNODES:-1} -gt 1 || -n ${PORT:-} ]]; then
        meeting=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
    fi
}

# NNODES may be a range. RDZV_ID tells runs apart that meet at one address, RDZV_CONF is torchrun's --rdzv-conf,
# LOCAL_ADDR the address of this machine where its name is not one.
set_elastic_meeting() {
    meeting=(--standalone)
    if [[ ${NNODES:-1} != 1 || -n ${PORT:-} ]]; then
        meeting=(--nnodes "${NNODES:-1}" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-training}"
            --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${PORT:-29500}")
        [[ -z ${RDZV_CONF:-} ]] || meeting+=(--rdzv-conf "$RDZV_CONF")
        [[ -z ${LOCAL_ADDR:-} ]] || meeting+=(--local-addr "$LOCAL_ADDR")
    fi
}

start_processes() { # start_processes GPUS ARGUMENTS_OF_PYTHON...
    # Processes on one machine share its cores.
    local cores=$(($(nproc) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
    shift
    exec "${PYTHON:-python}" "$@" --launcher pytorch
}
