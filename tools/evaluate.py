r"""Evaluate a trained run on files of records: `hgpt evaluate`.

    torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint runs/demo/stage3 \
        --data held-out=runs/demo/assets/vl_health_mini/test.json --output runs/demo/evaluation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
