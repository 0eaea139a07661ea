#!/usr/bin/env python
"""Run the frozen vision tower once over the pictures of dataset folders; training then reads its features.

    python tools/cache_features.py --config run.yaml
    torchrun --nproc-per-node 8 tools/cache_features.py --config run.yaml      (the processes share out the folders)

Each dataset folder gets a sub-folder (default: features). Train with data.feature_cache=features. A folder that is
complete and fits is left as it is, so an interrupted command is simply started again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_hgpt import distributed
from megatron_hgpt.config_io import preset_names
from megatron_hgpt.data.feature_cache import DTYPES
from megatron_hgpt.data.feature_cache_writer import CacheOptions, cache_features
from megatron_hgpt.errors import ConfigError, HealthGPTError
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.samples import TASKS
from megatron_hgpt.vision.clip import HVPTower


def build_parser() -> argparse.ArgumentParser:
    """The arguments; overrides of the configuration follow them."""
    parser = argparse.ArgumentParser(
        description="Write the vision feature cache of dataset folders.",
        epilog="key.sub=value overrides of the configuration follow, e.g. training.precision=fp32",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML run configuration, for its tower and depths")
    parser.add_argument("--preset", choices=preset_names(), help="a model that lies beneath the file")
    parser.add_argument(
        "--dataset", type=Path, nargs="+", metavar="FOLDER", help="dataset folders (default: data.train, validation)"
    )
    parser.add_argument("--name", help="sub-folder to write (default: data.feature_cache, else features)")
    parser.add_argument("--depths", choices=("task", "both"), default="task", help="the sample's task's only, or both")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the stored features (default: training.precision)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per pass of the tower")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument("--device", help="of the tower (default: the process's GPU, else cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there already")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _device(rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def run(arguments: argparse.Namespace) -> None:
    """Cache the folders that are this process's share, and print a line for each."""
    config = load_resolved(arguments.config, arguments.overrides, arguments.preset)
    rank, world_size = distributed.rank_from_environment(), distributed.world_size_from_environment()
    name = arguments.name or config.data.feature_cache or "features"
    folders = arguments.dataset or [Path(folder) for folder in (*config.data.train, *config.data.validation)]
    if not folders:
        raise ConfigError("no dataset folder: pass --dataset, or set data.train")
    options = CacheOptions(
        precision=config.training.precision,
        dtype=arguments.dtype or config.training.precision,
        both_depths=arguments.depths == "both",
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress_bar=rank == 0,
    )
    tower = HVPTower.from_config(config.model.vision, TASKS)
    tower.to(device=arguments.device or _device(rank), dtype=DTYPES[options.precision][0])
    for folder in list(dict.fromkeys(folders))[rank::world_size]:
        manifest = cache_features(folder, folder / name, tower=tower, vision=config.model.vision, options=options)
        size = sum(manifest["files"].values())
        print(f"{folder / name}: {manifest['pictures']} distinct pictures for {manifest['images']} images,", flush=True)
        print(f"  {manifest['dtype']}, {size / 2**20:.1f} MiB; skipped: {manifest['skipped'] or 'none'}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Entry point: returns the exit status; a user's mistake is one line, not a traceback."""
    arguments = build_parser().parse_intermixed_args(list(argv))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_hgpt").setLevel(logging.INFO)
    try:
        run(arguments)
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
