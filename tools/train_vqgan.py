"""Train a small VQGAN (f = 8: one index per 8 x 8 pixels) on your own pictures, on a CPU.

    python tools/train_vqgan.py --images pictures/ --output models/vqgan
    python tools/train_vqgan.py --images train.json --image-root images/ --output models/vqgan --resolution 128

The folder gets model.yaml and last.ckpt, which `model.vq.path` takes. Every tenth picture is held out and measured.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of pictures, or JSON records"
    )
    parser.add_argument("--image-root", type=Path, help="folder of the records' pictures; default: the JSON file's")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder of the VQGAN")
    parser.add_argument("--resolution", type=int, default=64, help="side in pixels, a multiple of 8")
    parser.add_argument("--num-codes", type=int, default=256, help="entries of the codebook")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from megatron_hgpt.errors import HealthGPTError
    from megatron_hgpt.vl_health.vqgan_pictures import train_on_pictures

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        figures = train_on_pictures(
            arguments.images,
            arguments.output,
            resolution=arguments.resolution,
            num_codes=arguments.num_codes,
            num_steps=arguments.steps,
            seed=arguments.seed,
            image_root=arguments.image_root,
        )
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    side = arguments.resolution // 8
    print(
        f"{arguments.output}: {figures['psnr']:.1f} dB on {figures['num_pictures']:.0f} training pictures, "
        f"{figures['held_out_psnr']:.1f} dB on {figures['num_held_out']:.0f} held-out ones, "
        f"{figures['num_skipped']:.0f} skipped; {figures['codes_used']:.0f} of {arguments.num_codes} codes used\n"
        f"configuration: model.vq.path={arguments.output} model.vq.num_codes={arguments.num_codes} "
        f"model.vq.num_indices={side * side}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
