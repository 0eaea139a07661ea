"""``hgpt generate``: one answer, or one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hgpt.bounds import Above, AtMost, Within
from megatron_hgpt.cli import frame
from megatron_hgpt.errors import ConfigError, DataError, SkipSample

if TYPE_CHECKING:
    from PIL.Image import Image

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
        "--max-new-tokens",
        type=frame.number(int, Within(1, 2**16)),
        default=128,
        metavar="N",
        help="of the answer (default: 128)",
    )
    temperature = frame.number(float, Within(0, 100))
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument(
        "--top-k",
        type=frame.number(int, Within(0, 2**22)),
        default=0,
        metavar="K",
        help="of the K likeliest tokens; 0 is all",
    )
    share = frame.number(float, Above(0), AtMost(1))
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="of the fewest tokens that reach P")
    parser.add_argument(
        "--seed", type=frame.number(int, Within(0, 2**31 - 1)), default=0, metavar="N", help="of the random choice"
    )
    frame.add_overrides(parser)


def check_drawn(file: Path) -> None:
    """Refuse a file that Pillow could not save a picture as.

    Raises:
        ConfigError: its ending is no picture's.
    """
    from PIL import Image

    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--draw {file}: {file.suffix or 'no ending'} is not a picture's; name it .png")


def complete_question(question: str, num_images: int) -> str:
    """The question with a placeholder for every picture.

    Raises:
        ConfigError: it has some already, and not as many as there are pictures.
    """
    if (given := question.count("<image>")) not in (0, num_images):
        raise ConfigError(f"--question has {given} <image> for {num_images} --image; write one for each, or none")
    return question if given else "<image>\n" * num_images + question


def read_pictures(files: Sequence[Path]) -> list[Image]:
    """The pictures.

    Raises:
        DataError: one cannot be read.
    """
    from megatron_hgpt.vision.preprocess import load_image

    pictures = []
    for file in files:
        try:
            pictures.append(load_image(file))
        except SkipSample as error:
            raise DataError(f"--image {file}: {error.detail}") from error
    return pictures


def run(arguments: argparse.Namespace) -> None:
    """Answer or draw."""
    frame.require_run(arguments.checkpoint)
    for file in arguments.image:
        frame.require_file(file, "--image")
    if arguments.draw:
        check_drawn(arguments.draw)
        frame.require_writable(arguments.draw, "--draw")
    question = complete_question(arguments.question, len(arguments.image))
    pictures = read_pictures(arguments.image)
    from megatron_hgpt import distributed
    from megatron_hgpt.environment import rank_from_environment
    from megatron_hgpt.inference.generator import Prompt, Sampling
    from megatron_hgpt.inference.loading import load_run
    from megatron_hgpt.samples import Task

    loaded = load_run(arguments.checkpoint, overrides=arguments.overrides)
    try:
        prompt = Prompt(
            task=Task.GENERATION if arguments.draw else Task.COMPREHENSION,
            question=question,
            images=list(pictures),
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
