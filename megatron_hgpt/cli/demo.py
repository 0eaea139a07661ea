"""``hgpt demo``: HealthGPT end to end on real small medical images."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.bounds import Within
from megatron_hgpt.cli import frame

HELP = "train, use and report a tiny HealthGPT on real small medical images"
EXAMPLES = """
hgpt demo                        a tiny Phi-3-shaped model, two processes
hgpt demo --backbone smollm2     SmolLM2-135M, three; long on a CPU
"""
NOTES = """
Everything goes to runs/demo (runs/demo-smollm2) in the working directory, or to --output. A second run continues where
the first stopped; a stage whose configuration changed starts afresh.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where to, and how much."""
    parser.add_argument(
        "--backbone", choices=("tiny", "smollm2"), default="tiny", help="language model (default: tiny)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/demo, or runs/demo-smollm2")
    parser.add_argument(
        "--vqgan-steps",
        type=frame.number(int, Within(2, 10**6)),
        default=500,
        metavar="N",
        help="of the VQGAN's training (default: 500)",
    )
    parser.add_argument(
        "--max-vqa",
        type=frame.number(int, Within(0, 10**6)),
        default=120,
        metavar="N",
        help="questions per split (default: 120)",
    )
    parser.add_argument(
        "--max-images",
        type=frame.number(int, Within(0, 10**6)),
        default=40,
        metavar="N",
        help="pictures per split (default: 40)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every stage's configuration")


def run(arguments: argparse.Namespace) -> int:
    """All of it."""
    from megatron_hgpt.demo.run import run as run_demo

    return run_demo(
        backbone=arguments.backbone,
        output=arguments.output,
        vqgan_steps=arguments.vqgan_steps,
        max_vqa=arguments.max_vqa,
        max_images=arguments.max_images,
        overrides=arguments.overrides,
    )
