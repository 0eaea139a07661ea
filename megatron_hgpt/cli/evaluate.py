"""``hgpt evaluate``: a trained run on held-out records."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_hgpt.bounds import Within
from megatron_hgpt.cli import frame
from megatron_hgpt.errors import ConfigError

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
_PLAIN_NAME = re.compile(r"\w[\w .-]*")


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
    parser.add_argument(
        "--max-vqa", type=frame.number(int, Within(0, 10**9)), metavar="N", help="questions per split at most"
    )
    parser.add_argument(
        "--max-images", type=frame.number(int, Within(0, 10**9)), metavar="N", help="pictures per split at most"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=frame.number(int, Within(1, 2**16)),
        default=64,
        metavar="N",
        help="per answer (default: 64)",
    )
    frame.add_overrides(parser)


def read_splits(data: Sequence[str]) -> dict[str, Path]:
    """The files of ``--data`` by the name of their split, which names a folder as well.

    What stands before the first ``=`` is the split if it is a plain name; else all of it is a path.

    Raises:
        ConfigError: neither a plain name nor a file, or a name that two files share.
    """
    splits: dict[str, Path] = {}
    for item in data:
        name, separator, file = item.partition("=")
        if not separator or not _PLAIN_NAME.fullmatch(name):
            if separator and not Path(item).is_file():
                raise ConfigError(f"--data {item}: {name!r} is no plain name of a split; write held-out=FILE, or FILE")
            name, file = Path(item).stem, item
        if name in splits:
            raise ConfigError(f"--data {splits[name]} and {file} would both be split {name!r}; write NAME=FILE")
        splits[name] = Path(file)
    return splits


def run(arguments: argparse.Namespace) -> None:
    """Evaluate every split; a table of the figures goes to stdout."""
    splits = read_splits(arguments.data)
    frame.require_run(arguments.checkpoint)
    for file in splits.values():
        frame.require_file(file, "--data")
    train: Path | None = arguments.baseline
    if train is not None:
        frame.require_file(train, "--baseline")
    frame.require_writable(arguments.output, "--output", is_folder=True)
    from megatron_hgpt import distributed
    from megatron_hgpt.evaluation.runner import evaluate, majority_baseline
    from megatron_hgpt.evaluation.store import save_results
    from megatron_hgpt.evaluation.table import results_table
    from megatron_hgpt.inference.loading import load_run

    baseline = majority_baseline(train, arguments.image_root or train.parent) if train else None
    loaded = load_run(arguments.checkpoint, overrides=arguments.overrides)
    folders: dict[str, Path] = {}
    try:
        for split, file in splits.items():
            results = evaluate(
                loaded, file, arguments.image_root or file.parent, max_vqa=arguments.max_vqa,
                max_images=arguments.max_images, max_new_tokens=arguments.max_new_tokens, baseline=baseline,
            )  # fmt: skip
            if results is not None:
                folders[split] = arguments.output / split
                save_results(folders[split], vqa=results[0], images=results[1], split=split)
    finally:
        if folders:  # those that are finished, also where a later one fails
            frame.write(results_table(folders))
            frame.write("\n" + "\n".join(f"wrote {folder / 'results.json'}" for folder in folders.values()))
        distributed.shutdown()
