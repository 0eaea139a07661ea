#!/usr/bin/env bash
# -*- mode: python -*-
""":"  # For bash this line is the command ":"; for Python it opens a string that ends at the next triple quote.
# Train HealthGPT. One file for both ways to start it:
#
#   bash examples/pretrain_hgpt.sh                                            the demo, end to end
#   bash examples/pretrain_hgpt.sh --config examples/configs/….yaml k.s=v     starts torchrun itself
#   torchrun --nproc-per-node 2 examples/pretrain_hgpt.sh --config … k.s=v    torchrun runs this file with Python
#
# Environment, for the second way: NPROC_PER_NODE (default: the GPUs, or on a CPU one replica of the
# model: tensor x pipeline x context), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then
    echo "no arguments: running the demo (tools/run_demo.py); --help lists the options" >&2
    exec "$python" "$root/tools/run_demo.py"
fi
dry_run=
for argument in "$@"; do
    case "$argument" in
    --help | -h) exec "$python" "$root/examples/pretrain_hgpt.sh" --help ;;
    --dry-run) dry_run=1 ;;
    esac
done
if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE="$("$python" -W ignore -m megatron_hgpt.processes "$@")"
fi
if [ -n "$dry_run" ]; then # one process answers for all of them
    WORLD_SIZE=$((NPROC_PER_NODE * ${NNODES:-1})) exec "$python" "$root/examples/pretrain_hgpt.sh" "$@"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((($(nproc) + NPROC_PER_NODE - 1) / NPROC_PER_NODE)))}"
rendezvous=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" "$root/examples/pretrain_hgpt.sh" "$@"
: <<'# end of the Python part'
":"""

import sys
from pathlib import Path

# torchrun starts this file by path: the repository root is not on the path of an uninstalled checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Checkpoint writers are spawned processes that import this file again: they must not start a run.
if __name__ == "__main__":
    from megatron_hgpt.cli import run

    sys.exit(run(sys.argv[1:]))
# end of the Python part
