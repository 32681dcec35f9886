# Sourced by dist_*.sh: torchrun with mmseg's environment variables.
# NNODES, NODE_RANK, MASTER_ADDR and PORT describe several machines; on a single one a free port is found by itself.
# PYTHON chooses the interpreter.

run_on() { # run_on GPUS TOOL ARGUMENTS...
    rendezvous=(--standalone)
    if [[ ${NNODES:-1} -gt 1 || -n ${PORT:-} ]]; then
        rendezvous=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
    fi
    start_processes "$@"
}

# Training that torchrun starts again, RESTARTS times, and that then goes on from the newest checkpoint. NNODES may be a
# range. RDZV_ID tells runs apart that share an address, RDZV_CONF is torchrun's --rdzv-conf, LOCAL_ADDR the address of
# this machine where its name does not resolve.
run_with_restarts() { # run_with_restarts RESTARTS GPUS TOOL ARGUMENTS...
    rendezvous=(--standalone)
    if [[ ${NNODES:-1} != 1 || -n ${PORT:-} ]]; then
        rendezvous=(--nnodes "${NNODES:-1}" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-training}"
            --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${PORT:-29500}")
        [[ -z ${RDZV_CONF:-} ]] || rendezvous+=(--rdzv-conf "$RDZV_CONF")
        [[ -z ${LOCAL_ADDR:-} ]] || rendezvous+=(--local-addr "$LOCAL_ADDR")
    fi
    rendezvous+=(--max-restarts "$1")
    shift
    # Each round gets a store of its own: agents would otherwise wait for one that has gone with its machine.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    start_processes "$@" --resume
}

start_processes() { # start_processes GPUS TOOL ARGUMENTS...
    local processes=$1
    shift
    # Processes on one machine share its cores.
    local cores=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
    # torchrun 2.9 and newer hands a batch system's warning on; an older one is ended by it, which its processes notice.
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
    exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" "$@" \
        --launcher pytorch
}
