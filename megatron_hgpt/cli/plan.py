"""``hgpt plan``: which layouts of a cluster fit a model, how fast they are, and what limits them."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hgpt.bounds import Above, AtMost, Within
from megatron_hgpt.cli import frame
from megatron_hgpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hgpt.planner.measure import Comparison
    from megatron_hgpt.planner.request import PlanRequest

HELP = "plan layouts for a cluster: memory, traffic, step time; needs no GPU"
EXAMPLES = r"""
hgpt plan --preset healthgpt_l14 --num-gpus 512 model.max_seq_length=4096
hgpt plan --preset healthgpt_l14 --num-gpus 64 training.recompute=full \
    parallel.tensor_model_parallel_size=2
hgpt plan --check      the memory formulas against a model that runs here
"""
NOTES = """
Layout: a size that key=value names (parallel.…) is fixed, the others are searched; the file's own section `parallel`
does not count. Formulas and assumptions: docs/planner.md.
"""
# Models without weights are the point here: that they start at random is no news.
LOG_LEVEL = logging.ERROR

_GPU_FIELDS = {
    "memory_gib": "GiB", "bf16_tflops": "TFLOP/s", "fp8_tflops": "TFLOP/s", "hbm_gb_s": "GB/s",
    "nvlink_gb_s": "GB/s", "network_gb_s": "GB/s",
}  # fmt: skip
_ASSUMPTIONS = {
    "efficiency": "share of the peak that GEMMs reach",
    "network_efficiency": "share of the links' bandwidth",
    "collective_latency_s": "start of one collective, seconds",
    "elementwise_passes": "HBM passes per saved byte",
    "reserve_gib": "context, NCCL, fragmentation, GiB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cluster, what is assumed, and what is written."""
    frame.add_configuration(parser)
    batch = parser.add_argument_group("samples")
    batch.add_argument(
        "--supervised-tokens", type=frame.number(int, Within(1, 2**20)), metavar="N", help="per sample, for every task"
    )
    batch.add_argument(
        "--images-per-sample", type=frame.number(int, Within(0, 1024)), default=1, metavar="N", help="default: 1"
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--num-gpus", type=frame.number(int, Within(1, 10**5)), default=8, metavar="N", help="default: 8"
    )
    cluster.add_argument(
        "--gpus-per-node", type=frame.number(int, Within(1, 1024)), default=8, metavar="N", help="default: 8"
    )
    cluster.add_argument("--gpu", default="h100", metavar="NAME", help="a100-40, a100-80, h100, h200 or b200")
    positive = frame.number(float, Above(0), AtMost(10**6))
    for name, unit in _GPU_FIELDS.items():
        cluster.add_argument(f"--{name.replace('_', '-')}", type=positive, metavar="X", help=f"{unit}, not the table's")
    assumed = parser.add_argument_group("assumptions")
    for name, text in _ASSUMPTIONS.items():
        assumed.add_argument(
            f"--{name.replace('_', '-')}", type=frame.number(float, Within(0, 10**6)), metavar="X", help=text
        )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top", type=frame.number(int, Within(1, 10**6)), default=16, metavar="N", help="layouts shown (default: 16)"
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="everything, in bytes and seconds")
    output.add_argument("--chart", type=Path, metavar="FILE.svg", help="the memory as bars")
    output.add_argument("--check", action="store_true", help="compare the formulas with a small model that runs here")


def build_request(arguments: argparse.Namespace) -> PlanRequest:
    """The question in the planner's terms.

    Raises:
        ConfigError: an argument that is malformed or does not fit another one.
    """
    config = frame.load(arguments)
    if not (arguments.preset or arguments.config):
        raise ConfigError("name a model: --preset healthgpt_m3, healthgpt_l14 … or --config FILE")
    from megatron_hgpt.planner.hardware import Cluster, gpu_named
    from megatron_hgpt.planner.request import Assumptions, PlanRequest, default_supervised_tokens, fixed_sizes
    from megatron_hgpt.samples import TASKS

    training = config.training
    if config.model.hlora.generation is None and training.stage == "stage3_joint":
        training.stage = "stage3_comprehension"  # the model has one plugin; the table's head names the stage
    assumed = {name: value for name in _ASSUMPTIONS if (value := getattr(arguments, name)) is not None}
    count = arguments.supervised_tokens
    return PlanRequest(
        config=config,
        cluster=Cluster(
            gpu_name=arguments.gpu,
            gpu=gpu_named(arguments.gpu, {name: getattr(arguments, name) for name in _GPU_FIELDS}),
            num_gpus=arguments.num_gpus,
            gpus_per_node=arguments.gpus_per_node,
        ),
        precision=training.precision,
        recompute=training.recompute or "none",
        supervised_tokens=default_supervised_tokens(config) if count is None else dict.fromkeys(TASKS, count),
        images_per_sample=arguments.images_per_sample,
        asked=tuple(item for item in arguments.overrides if not item.startswith("parallel.")),
        assumptions=Assumptions(**assumed),
        **fixed_sizes(config.parallel, arguments.overrides),
    )


def comparison_table(results: Mapping[str, Sequence[Comparison]]) -> str:
    """Text: predicted and measured bytes and their deviation."""
    lines = [f"{'recompute':<11}{'figure':<28}{'predicted':>14}{'measured':>14}{'deviation':>11}"]
    for recompute, rows in results.items():
        lines += [
            f"{recompute:<11}{row.name:<28}{row.predicted:>14,}{row.measured:>14,}{row.deviation:>11.2%}"
            for row in rows
        ]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Plan, or check the formulas."""
    if arguments.chart and arguments.chart.suffix != ".svg":
        raise ConfigError(f"--chart {arguments.chart}: charts are drawn as .svg; name the file so")
    frame.require_writable(arguments.json, "--json")
    frame.require_writable(arguments.chart, "--chart")
    if arguments.check:
        from megatron_hgpt.planner.measure import check_here

        frame.write(comparison_table(check_here()))
        return
    request = build_request(arguments)
    from megatron_hgpt.files import write_atomic
    from megatron_hgpt.planner.chart import memory_chart
    from megatron_hgpt.planner.plan import make_plan
    from megatron_hgpt.planner.report import as_json, table

    plan = make_plan(request)
    frame.write(table(plan, top=arguments.top))
    if arguments.json:
        write_atomic(arguments.json, json.dumps(as_json(plan), indent=1) + "\n")
    if arguments.chart:
        write_atomic(arguments.chart, memory_chart(plan, top=arguments.top))
