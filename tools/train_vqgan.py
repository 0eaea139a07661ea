"""Train a small VQGAN on your own pictures, on a CPU: `hgpt train-vqgan`.

python tools/train_vqgan.py --images pictures/ --output models/vqgan
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["train-vqgan", *sys.argv[1:]]))
