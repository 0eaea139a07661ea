"""``hgpt demo``: HealthGPT end to end on real small medical images."""

from __future__ import annotations

import argparse

HELP = "train, use and report a tiny HealthGPT on real small medical images"
EXAMPLES = """
hgpt demo                        a tiny Phi-3-shaped model, two processes
hgpt demo --backbone smollm2     SmolLM2-135M, three; long on a CPU
"""
NOTES = """Everything goes to runs/demo (or --output). A second run continues where the first stopped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's own."""
    from megatron_hgpt.demo.run import add_arguments as add_demo_arguments

    add_demo_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """All of it."""
    from megatron_hgpt.demo.run import run as run_demo

    return run_demo(arguments)
