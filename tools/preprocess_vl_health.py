"""Write the dataset folder that training reads from VL-Health records and their pictures: `hgpt preprocess`.

python tools/preprocess_vl_health.py --config run.yaml --input train.json --image-root images --output data/train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["preprocess", *sys.argv[1:]]))
