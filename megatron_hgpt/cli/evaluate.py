"""``hgpt evaluate``: a trained run on held-out records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_hgpt.cli import frame

HELP = "score a trained run: answers by exact match, pictures by SSIM, PSNR and MSE"
EXAMPLES = r"""
hgpt evaluate --checkpoint runs/demo/stage3 --output runs/demo/evaluation \
    --data held-out=runs/demo/assets/vl_health_mini/test.json
torchrun --nproc-per-node 2 -m megatron_hgpt evaluate \
    --checkpoint runs/m3_stage3 --data test.json --output evaluation
"""
NOTES = """
A folder per split is written below --output: results.json and the pictures. Processes share the samples;
parallel.tensor_model_parallel_size=N lets N of them share the model as well.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and how much of it."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FOLDER", help="run folder or checkpoint folder"
    )
    parser.add_argument(
        "--data", action="append", required=True, metavar="[SPLIT=]FILE", help="records; repeat for several splits"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="of image paths (default: each file's)")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="training file: its most frequent answers are scored beside"
    )
    parser.add_argument("--max-vqa", type=frame.at_least(0), metavar="N", help="questions per split at most")
    parser.add_argument("--max-images", type=frame.at_least(0), metavar="N", help="pictures per split at most")
    parser.add_argument(
        "--max-new-tokens", type=frame.at_least(1), default=64, metavar="N", help="per answer (default: 64)"
    )
    frame.add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate every split; the summaries go to stdout as JSON."""
    frame.require_run(arguments.checkpoint)
    splits = {name or Path(path).stem: Path(path) for name, _, path in (i.rpartition("=") for i in arguments.data)}
    for file in splits.values():
        frame.require_file(file, "--data")
    train: Path | None = arguments.baseline
    if train is not None:
        frame.require_file(train, "--baseline")
    from megatron_hgpt import distributed
    from megatron_hgpt.evaluation.runner import evaluate, majority_baseline
    from megatron_hgpt.evaluation.store import save_results
    from megatron_hgpt.inference.loading import load_run

    baseline = majority_baseline(train, arguments.image_root or train.parent) if train else None
    loaded = load_run(arguments.checkpoint, overrides=arguments.overrides)
    try:
        for split, file in splits.items():
            results = evaluate(
                loaded, file, arguments.image_root or file.parent, max_vqa=arguments.max_vqa,
                max_images=arguments.max_images, max_new_tokens=arguments.max_new_tokens, baseline=baseline,
            )  # fmt: skip
            if results is not None:
                summary = save_results(arguments.output / split, vqa=results[0], images=results[1], split=split)
                frame.write(json.dumps({split: summary}, indent=1))
    finally:
        distributed.shutdown()
