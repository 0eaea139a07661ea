"""``hgpt generate``: one answer, or one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.cli import frame

HELP = "ask a trained run one question, or have it draw"
EXAMPLES = r"""
hgpt generate --checkpoint runs/demo/stage3 --image ct.png \
    --question "What is the modality?"
hgpt generate --checkpoint runs/demo/stage3 --image ct.png \
    --question "Reconstruct the image." --draw out.png
"""
NOTES = """
`<image>` placeholders are put in front of the question, one per --image, unless it has them already. The answer (or
the picture's file name) alone goes to stdout.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The request, and how tokens are chosen."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FOLDER", help="run folder or checkpoint folder"
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="question or instruction")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="picture; repeat for several"
    )
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw a picture into this file instead of answering")
    parser.add_argument("--free", action="store_true", help="draw without forcing the right number of image tokens")
    parser.add_argument(
        "--max-new-tokens", type=frame.at_least(1), default=128, metavar="N", help="of the answer (default: 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K likeliest tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the fewest tokens that reach P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random choice")
    frame.add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answer or draw."""
    frame.require_run(arguments.checkpoint)
    for file in arguments.image:
        frame.require_file(file, "--image")
    from megatron_hgpt import distributed
    from megatron_hgpt.environment import rank_from_environment
    from megatron_hgpt.inference.generator import Prompt, Sampling
    from megatron_hgpt.inference.loading import load_run
    from megatron_hgpt.samples import Task

    loaded = load_run(arguments.checkpoint, overrides=arguments.overrides)
    try:
        question = arguments.question
        if "<image>" not in question:
            question = "<image>\n" * len(arguments.image) + question
        prompt = Prompt(
            task=Task.GENERATION if arguments.draw else Task.COMPREHENSION,
            question=question,
            images=list(arguments.image),
        )
        sampling = Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
        )
        if arguments.draw:
            vqgan = loaded.require_vqgan()
            (image,) = loaded.generator.draw_images([prompt], vqgan, sampling=sampling, constrained=not arguments.free)
            result = str(arguments.draw)
        else:
            (result,) = loaded.generator.answer([prompt], max_new_tokens=arguments.max_new_tokens, sampling=sampling)
        if rank_from_environment() == 0:  # every tensor-parallel rank has the same result
            if arguments.draw:
                arguments.draw.parent.mkdir(parents=True, exist_ok=True)
                image.save(arguments.draw)
            frame.write(result)
    finally:
        distributed.shutdown()
