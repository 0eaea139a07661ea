#!/usr/bin/env bash
# -*- mode: python -*-
""":"  # For bash this line is the command ":"; for Python it opens a string that ends at the next triple quote.
# Train HealthGPT: `hgpt train` for a checkout that is not installed. One file for both ways to start it:
#
#   bash examples/pretrain_hgpt.sh                                            the demo, end to end
#   bash examples/pretrain_hgpt.sh --config examples/configs/….yaml k.s=v     starts the processes itself
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
    echo "no arguments: running the demo (hgpt demo); --help lists the options" >&2
    exec "$python" -m megatron_hgpt demo
fi
exec "$python" -m megatron_hgpt train "$@"
: <<'# end of the Python part'
":"""

import sys
from pathlib import Path

# torchrun starts this file by path: the repository root is not on the path of an uninstalled checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Nothing here spawns processes, but a library may, and each imports this file again: it must not start a run.
if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
# end of the Python part
