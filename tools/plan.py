"""Plan a run: which layouts of a cluster fit, how long a step takes, and what limits it: `hgpt plan`.

python tools/plan.py --preset healthgpt_l14 --num-gpus 512 --gpu h100 model.max_seq_length=4096
python tools/plan.py --check          # the memory formulas against a small model that really runs here
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
