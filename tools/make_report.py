r"""Write one self-contained HTML report from the folders of finished stages and evaluations: `hgpt report`.

    python tools/make_report.py --out report.html --run runs/demo/stage1 --run runs/demo/stage2 \
        --evaluation train=runs/demo/evaluation/train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main(["report", *sys.argv[1:]]))
