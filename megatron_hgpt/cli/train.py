"""``hgpt train``: one stage of training."""

from __future__ import annotations

import argparse
import logging

from megatron_hgpt.batching import replica_size
from megatron_hgpt.cli import frame
from megatron_hgpt.config import RunConfig
from megatron_hgpt.environment import (
    is_started_again,
    nodes_from_environment,
    rank_from_environment,
    started_by_torchrun,
    world_size_from_environment,
)
from megatron_hgpt.errors import ConfigError, raise_problems

logger = logging.getLogger(__name__)

HELP = "train one stage; resumes where an earlier run stopped"
EXAMPLES = """
hgpt train --config my_run.yaml --dry-run
hgpt train --config my_run.yaml training.num_epochs=2
torchrun --nproc-per-node 8 -m megatron_hgpt train --config my_run.yaml
NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 hgpt train --config my_run.yaml
NNODES=2:4 NODE_RANK=0 MASTER_ADDR=host0 hgpt train --config my_run.yaml
"""
NOTES = """
hgpt starts the processes itself: as many as the GPUs hold replicas of the model, on a CPU one replica (tensor x
pipeline x context), or NPROC_PER_NODE. A failed run starts again from its newest checkpoint (launch.*). NNODES=2:4
goes on with what is left of four nodes. Under torchrun it is one of torchrun's processes. It exits with 0 when
training is finished, 2 after a mistake, 3 after divergence, 143 or 130 when a signal stopped it and it has saved, 75
after a hang; that and anything else, a crash, is started again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and looking before leaping."""
    frame.add_configuration(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, parameters, batch arithmetic; start nothing"
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Train, in this process or in the ones that it starts."""
    from megatron_hgpt.model_folders import PUBLISHED, published_variant, read_run
    from megatron_hgpt.validation import find_problems

    if started_by_torchrun():
        from megatron_hgpt.interruption import die_with_launcher

        die_with_launcher()
    config, read = read_run(arguments.config, arguments.overrides, arguments.preset)
    if is_started_again():  # checkpoint.resume=false was for the first time; what is there now is this run's own
        config.checkpoint.resume = True
    nodes = nodes_from_environment()
    problems: list[str] = []
    if started_by_torchrun():
        processes, world_sizes = 0, [world_size_from_environment()]
    else:
        from megatron_hgpt.cli.processes import processes_per_node

        try:
            processes = processes_per_node(config.parallel, nodes)
        except ConfigError as error:  # the rest is checked for the GPUs that it needs
            problems.append(str(error))
            processes = replica_size(config.parallel)
        world_sizes = [processes * number for number in range(nodes.num_nodes, nodes.min_nodes - 1, -1)]
    # All that is wrong with it in one message, before any process starts and says the same again.
    for world_size in world_sizes:
        problems += find_problems(config, world_size, check_paths=not arguments.dry_run, read=read)
    raise_problems(problems)
    if arguments.dry_run:
        return _dry_run(config, world_sizes[0])
    # One process is watched as well, unless it is not to be started again.
    if processes and (world_sizes[0] > 1 or config.launch.max_restarts):
        from megatron_hgpt.cli.processes import run_processes

        return run_processes(processes, nodes, ["train", *arguments.argv], config)
    from megatron_hgpt.run_stage import main

    if (variant := published_variant(config.model)) is not None:
        logger.info(
            "backbone of %s's shape: its published ranks and learning rates are the defaults", PUBLISHED[variant]
        )
    stopped_by = main(config)
    return 128 + stopped_by if stopped_by else 0


def _dry_run(config: RunConfig, world_size: int) -> int:
    """What the run would be, for the processes that would start, and what it would not find."""
    from megatron_hgpt.dry_run import describe
    from megatron_hgpt.validation import missing_inputs

    if rank_from_environment() == 0:
        frame.write(describe(config, world_size))
        if missing := list(missing_inputs(config)):
            frame.write("\n".join(["", "# not here", "", *missing]))
    return 0
