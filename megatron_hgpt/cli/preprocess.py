"""``hgpt preprocess``: records and pictures into a dataset folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.bounds import Within
from megatron_hgpt.cli import frame

HELP = "write a dataset folder from VL-Health records and their pictures"
EXAMPLES = r"""
hgpt preprocess --config my_run.yaml --input train.json --output data/train
hgpt preprocess --config my_run.yaml --input a.jsonl b.parquet \
    --image-root images --output data/train --workers 4
"""
NOTES = """
Tokenizer, template, vocabulary and VQGAN come from the configuration's section `model`, so that the dataset fits the
model that is trained on it. A record that cannot be used is skipped, counted by reason and listed in skipped.jsonl by
its id, file and number there; with --list-text with a few words of what it says, too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read, where to write, and how."""
    frame.add_configuration(parser)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".json, .jsonl, .parquet")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="dataset folder to write")
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="of image paths (default: each file's)")
    parser.add_argument("--source", metavar="NAME", help="of the source in the statistics (default: each file's)")
    parser.add_argument(
        "--workers",
        type=frame.number(int, Within(0, 256)),
        default=0,
        metavar="N",
        help="threads that decode pictures; 0 is inline",
    )
    parser.add_argument(
        "--window",
        type=frame.number(int, Within(1, 4096)),
        default=32,
        metavar="N",
        help="records at once, and the VQGAN's batch",
    )
    parser.add_argument("--device", type=frame.device, default="cpu", help="of the VQGAN (default: cpu)")
    parser.add_argument(
        "--max-consecutive-skips",
        type=frame.number(int, Within(1, 10**9)),
        default=100,
        metavar="N",
        help="unusable records that stop",
    )
    parser.add_argument(
        "--list-text", action="store_true", help="quote the skipped records in skipped.jsonl (may be private)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there already")


def run(arguments: argparse.Namespace) -> None:
    """Write the dataset and say what is in it."""
    from megatron_hgpt.data.preprocess_run import preprocess_problems, preprocess_run
    from megatron_hgpt.errors import raise_problems
    from megatron_hgpt.model_folders import read_run, resolve_model, with_read_problems

    frame.require_writable(arguments.output, "--output", is_folder=True)
    frame.require_device(arguments.device)
    config, read = read_run(arguments.config, arguments.overrides, arguments.preset)
    problems = [*resolve_model(config), *preprocess_problems(config, arguments.input, arguments.image_root)]
    raise_problems(with_read_problems(problems, read))  # of the configuration, the records and the pictures at once
    options = {
        "max_consecutive_skips": arguments.max_consecutive_skips,
        "num_workers": arguments.workers,
        "window": arguments.window,
        "list_text": arguments.list_text,
        "overwrite": arguments.overwrite,
        "progress_bar": True,
    }
    manifest = preprocess_run(
        config, arguments.input, arguments.output, image_root=arguments.image_root, source=arguments.source,
        device=arguments.device, **options,
    )  # fmt: skip
    counts = manifest["counts"]
    frame.write(f"{arguments.output}: {counts['samples']} samples {counts['per_task']}, {counts['images']} pictures,")
    frame.write(f"  {counts['tokens']} tokens, {counts['supervised_tokens']} supervised;",
                f"skipped: {manifest['skipped'] or 'none'}")  # fmt: skip
