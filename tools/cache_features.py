"""Run the frozen vision tower once over the pictures of dataset folders: `hgpt cache-features`.

python tools/cache_features.py --config run.yaml
torchrun --nproc-per-node 8 tools/cache_features.py --config run.yaml      (the processes share out the folders)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["cache-features", *sys.argv[1:]]))
