"""Ask a trained HealthGPT one question, or have it draw: `hgpt generate`.

python tools/generate.py --checkpoint runs/demo/stage3 --image ct.png --question "What is the modality?"
python tools/generate.py --checkpoint runs/demo/stage3 --image ct.png --question "Reconstruct it." --draw out.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
