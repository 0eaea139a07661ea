"""Build what the demo trains on: mini VL-Health, a tokenizer, a backbone, a vision tower and a VQGAN.

    python tools/build_demo_assets.py --output runs/demo/assets --backbone tiny

Each step is skipped when it is complete and its inputs are unchanged. `assets.json` says where everything is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Command line."""
    from megatron_hgpt.demo.assets import build_assets
    from megatron_hgpt.errors import HealthGPTError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/assets"), help="folder of the assets")
    parser.add_argument("--backbone", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-size", type=int, default=640, help="most entries of the tiny tokenizer")
    parser.add_argument("--vqgan-steps", type=int, default=1500, help="optimizer steps of the VQGAN")
    arguments = parser.parse_args()
    try:
        build_assets(
            arguments.output,
            backbone=arguments.backbone,
            seed=arguments.seed,
            tokenizer_size=arguments.tokenizer_size,
            vqgan_steps=arguments.vqgan_steps,
        )
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
