"""``hgpt cache-features``: the frozen tower's features of dataset folders, computed once."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.bounds import Within
from megatron_hgpt.cli import frame
from megatron_hgpt.environment import rank_from_environment, world_size_from_environment
from megatron_hgpt.errors import ConfigError

HELP = "run the frozen vision tower once over the pictures of dataset folders"
EXAMPLES = """
hgpt cache-features --config my_run.yaml
torchrun --nproc-per-node 8 -m megatron_hgpt cache-features --config my_run.yaml
"""
NOTES = """
Each dataset folder gets a sub-folder (default: features); train with data.feature_cache=features. A folder that is
complete and fits is left as it is, so an interrupted command is simply started again. Processes share out the folders.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folders, and what is stored."""
    frame.add_configuration(parser)
    parser.add_argument(
        "--dataset", type=Path, nargs="+", metavar="FOLDER", help="dataset folders (default: data.train, validation)"
    )
    parser.add_argument("--name", help="sub-folder to write (default: data.feature_cache, else features)")
    parser.add_argument("--depths", choices=("task", "both"), default="task", help="the sample's task's only, or both")
    parser.add_argument("--dtype", metavar="TYPE", help="stored: bf16, fp16, fp32 (default: training.precision)")
    parser.add_argument(
        "--batch-size",
        type=frame.number(int, Within(1, 4096)),
        default=32,
        metavar="N",
        help="pictures per pass of the tower",
    )
    parser.add_argument(
        "--workers", type=frame.number(int, Within(0, 256)), default=2, metavar="N", help="threads that decode pictures"
    )
    parser.add_argument("--device", type=frame.device, help="of the tower (default: the process's GPU, else cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there already")


def run(arguments: argparse.Namespace) -> None:
    """Cache the folders that are this process's share, and say a line for each."""
    config = frame.load(arguments)
    rank, world_size = rank_from_environment(), world_size_from_environment()
    name = arguments.name or config.data.feature_cache or "features"
    folders = arguments.dataset or [Path(folder) for folder in (*config.data.train, *config.data.validation)]
    if not folders:
        raise ConfigError("no dataset folder: pass --dataset, or set data.train")
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"--name {name} must be the plain name of a sub-folder of each dataset folder")
    frame.require_device(arguments.device)
    for folder in folders:
        frame.require_folder(folder, "--dataset" if arguments.dataset else "data.train or data.validation:")
        frame.require_writable(folder / name, "the cache", is_folder=True)
    from megatron_hgpt.data.feature_cache import DTYPES
    from megatron_hgpt.data.feature_cache_writer import CacheOptions, cache_features
    from megatron_hgpt.samples import TASKS
    from megatron_hgpt.vision.clip import HVPTower

    dtype = arguments.dtype or config.training.precision
    if dtype not in DTYPES:
        raise ConfigError(f"features cannot be stored as {dtype!r}; set --dtype to one of {', '.join(sorted(DTYPES))}")
    options = CacheOptions(
        precision=config.training.precision,
        dtype=dtype,
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
        frame.write(f"{folder / name}: {manifest['pictures']} distinct pictures for {manifest['images']} images,")
        frame.write(f"  {manifest['dtype']}, {size / 2**20:.1f} MiB; skipped: {manifest['skipped'] or 'none'}")


def _device(rank: int) -> str:
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
