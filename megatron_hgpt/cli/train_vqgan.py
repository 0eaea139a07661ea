"""``hgpt train-vqgan``: a small image tokenizer of a user's own pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.bounds import Within
from megatron_hgpt.cli import frame

HELP = "train a small VQGAN (one index per 8 x 8 pixels) on your own pictures, on a CPU"
EXAMPLES = r"""
hgpt train-vqgan --images pictures/ --output models/vqgan
hgpt train-vqgan --images train.json --image-root images/ --output models/vqgan \
    --resolution 128 --num-codes 1024 --steps 2000
"""
NOTES = """
The folder gets model.yaml and last.ckpt, which `model.vq.path` takes. Every tenth picture is held out and measured.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pictures, where to, and how large."""
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of pictures, or JSON records"
    )
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="of records' paths (default: each file's)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder of the VQGAN")
    parser.add_argument(
        "--resolution",
        type=frame.number(int, Within(8, 1024)),
        default=64,
        metavar="N",
        help="pixels a side, 8 x n (default: 64)",
    )
    parser.add_argument(
        "--num-codes",
        type=frame.number(int, Within(1, 2**16)),
        default=256,
        metavar="N",
        help="of the codebook (default: 256)",
    )
    parser.add_argument(
        "--steps",
        type=frame.number(int, Within(2, 10**7)),
        default=500,
        metavar="N",
        help="optimizer steps (default: 500)",
    )
    parser.add_argument(
        "--seed",
        type=frame.number(int, Within(0, 2**31 - 1)),
        default=0,
        metavar="N",
        help="of all chance (default: 0)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, measure, and say what to set."""
    from megatron_hgpt.vl_health.vqgan_pictures import train_on_pictures

    frame.require_writable(arguments.output, "--output", is_folder=True)
    figures = train_on_pictures(
        arguments.images,
        arguments.output,
        resolution=arguments.resolution,
        num_codes=arguments.num_codes,
        num_steps=arguments.steps,
        seed=arguments.seed,
        image_root=arguments.image_root,
    )
    held_out = f"{figures['held_out_psnr']:.1f} dB on {figures['num_held_out']:.0f} held-out ones"
    if not figures["num_held_out"]:
        held_out = "too few to hold any out"
    frame.write(
        f"{arguments.output}: {figures['psnr']:.1f} dB on {figures['num_pictures']:.0f} training pictures, "
        f"{held_out}, {figures['num_skipped']:.0f} skipped; "
        f"{figures['codes_used']:.0f} of {arguments.num_codes} codes used"
    )
    frame.write(f"configuration: model.vq.path={arguments.output}")
