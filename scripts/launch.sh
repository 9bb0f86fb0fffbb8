# Sourced by the scripts beside it: sets PYTHON and defines `launch`, which runs a command on every process of the job.
#
#   NPROC_PER_NODE   processes on this machine              (default 1)
#   NNODES           machines                               (default 1)
#   NODE_RANK        this machine's number, from 0          (default 0)
#   MASTER_ADDR      address of machine 0                   (default 127.0.0.1)
#   MASTER_PORT      a free port on it                      (default 29500; on one machine any free one is taken)
#   MAX_RESTARTS     start all processes again so many times when one is lost; recover.sh goes on from its last checkpoint
#                    (default 0). Bad input (exit code 2 of a verb) is not tried again: it ends the job at once.
#   LOCAL_ADDR       with MAX_RESTARTS: address of this machine, where its own name does not lead the others to it
#
# Under Slurm: sbatch scripts/slurm.sbatch scripts/prune_llama.sh (see that file).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# each start of the processes meets at a store of its own: the agents' would still hold where those before it listened
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

require() {  # require NAME 'what it is'
  if [ -z "${!1:-}" ]; then echo "$(basename "$0"): set $1 ($2)" >&2; exit 2; fi
}

launch() {  # launch PROGRAM [ARGUMENT ...]: a file, or -m MODULE
  local nnodes="${NNODES:-1}" nproc="${NPROC_PER_NODE:-1}" restarts="${MAX_RESTARTS:-0}" torchrun=(-m torch.distributed.run)
  if [ "$restarts" != 0 ]; then torchrun=("$ROOT/scripts/torchrun.py"); fi
  if [ "$nnodes" = 1 ] && [ "$nproc" = 1 ] && [ "$restarts" = 0 ]; then
    exec "$PYTHON" "$@"
  elif [ "$nnodes" = 1 ]; then
    exec "$PYTHON" "${torchrun[@]}" --standalone --nproc-per-node "$nproc" --max-restarts "$restarts" "$@"
  elif [ "$restarts" != 0 ]; then # machines that meet again after a loss
    local host=0
    if [ "${NODE_RANK:-0}" = 0 ]; then host=1; fi
    exec "$PYTHON" "${torchrun[@]}" --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$restarts" \
      --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-megatron-prune}" --rdzv-conf "is_host=$host" \
      --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} "$@"
  else
    exec "$PYTHON" "${torchrun[@]}" --nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" \
      --nproc-per-node "$nproc" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
  fi
}
