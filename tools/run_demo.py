"""HealthGPT end to end on real small medical images: `hgpt demo`.

python tools/run_demo.py                        a tiny Phi-3-shaped model, two processes (TP 2 + sequence parallel)
python tools/run_demo.py --backbone smollm2     SmolLM2-135M, three processes; long on a CPU
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
