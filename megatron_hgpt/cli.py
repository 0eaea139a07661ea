"""The command line of a training run: ``--config FILE --preset NAME --dry-run key.sub=value …``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from megatron_hgpt import distributed
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import load_config, preset_names
from megatron_hgpt.dry_run import describe
from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.validation import validate

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; overrides follow them."""
    parser = argparse.ArgumentParser(
        prog="pretrain_hgpt.sh",
        description="Train one stage of HealthGPT.",
        epilog="key.sub=value overrides follow, e.g. training.stage=stage2 optimizer.lr=1e-4",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML run configuration")
    parser.add_argument("--preset", choices=preset_names(), help="a model that lies beneath the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, parameters and batch arithmetic; start nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def parse_args(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run and whether it is a dry run; options and overrides may be mixed.

    Raises:
        ConfigError: what `config_io.load_config` refuses.
    """
    arguments = build_parser().parse_intermixed_args(list(argv))
    return load_config(arguments.config, arguments.overrides, arguments.preset), arguments.dry_run


def run(argv: Sequence[str]) -> int:
    """Entry point: returns the exit status; a user's mistake is one line, not a traceback."""
    try:
        config, dry_run = parse_args(argv)
        if dry_run:
            world_size = max(distributed.world_size_from_environment(), config.parallel.tensor_model_parallel_size)
            validate(config, world_size, check_paths=False)
            if distributed.rank_from_environment() == 0:
                sys.stdout.write(describe(config, world_size) + "\n")
            return 0
        from megatron_hgpt.train import main

        main(config)
    except HealthGPTError as error:
        if distributed.rank_from_environment() == 0:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        logger.debug("details", exc_info=error)
        return 2
    return 0
