"""Plan a run: which layouts of a cluster fit, how long a step takes, and what limits it. Needs no GPU.

    python tools/plan.py --preset healthgpt_l14 --num-gpus 512 --gpu h100 --seq-length 4096
    python tools/plan.py --preset healthgpt_l14 --num-gpus 64 --gpu h100 --tensor 2 --pipeline 4 --recompute full
    python tools/plan.py --check          # the memory formulas against a small model that really runs here

Formulas and assumptions: docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron_hgpt.planner.measure import Comparison
    from megatron_hgpt.planner.request import PlanRequest

_GPU_FIELDS = ("memory_gib", "bf16_tflops", "fp8_tflops", "hbm_gb_s", "nvlink_gb_s", "network_gb_s")


def build_parser() -> argparse.ArgumentParser:
    """The arguments; overrides of the configuration follow them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML run configuration")
    parser.add_argument("--preset", help="a model that lies beneath the file")
    parser.add_argument("--stage", help="row of the stage table (default: the configuration's)")
    parser.add_argument("--seq-length", type=int, help="tokens per sample (default: model.max_seq_length)")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--global-batch-size", type=int)
    parser.add_argument("--precision", help="bf16, fp8 or fp32 (default: the configuration's)")
    parser.add_argument("--recompute", help="none, selective or full (default: the configuration's)")
    parser.add_argument("--no-distributed-optimizer", action="store_true")
    parser.add_argument("--supervised-tokens", type=int, help="per sample, for every task")
    parser.add_argument("--images-per-sample", type=int, default=1)
    layout = parser.add_argument_group("layout (default: every legal one)")
    for name in ("tensor", "pipeline", "context"):
        layout.add_argument(f"--{name}", type=int)
    layout.add_argument("--virtual", type=int, default=1, help="model chunks per pipeline stage")
    layout.add_argument("--first-layers", type=int, help="layers of the first pipeline stage")
    layout.add_argument("--last-layers", type=int, help="layers of the last pipeline stage")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--num-gpus", type=int, default=8)
    cluster.add_argument("--gpus-per-node", type=int, default=8)
    cluster.add_argument("--gpu", default="h100", help="a100-40, a100-80, h100, h200 or b200")
    for name in _GPU_FIELDS:
        cluster.add_argument(f"--{name.replace('_', '-')}", type=float, help="instead of the table's")
    assumed = parser.add_argument_group("assumptions")
    for name in ("efficiency", "network-efficiency", "collective-latency-s", "elementwise-passes", "reserve-gib"):
        assumed.add_argument(f"--{name}", type=float)
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=16, help="layouts in the table and the chart")
    output.add_argument("--json", type=Path, metavar="FILE")
    output.add_argument("--chart", type=Path, metavar="FILE.svg")
    output.add_argument("--check", action="store_true", help="compare the formulas with a small model that runs here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def build_request(arguments: argparse.Namespace) -> PlanRequest:
    """The question in the planner's terms.

    Raises:
        ConfigError: an argument that is malformed or does not fit another one.
    """
    from megatron_hgpt.errors import ConfigError
    from megatron_hgpt.model_folders import load_resolved
    from megatron_hgpt.planner.hardware import Cluster, gpu_named
    from megatron_hgpt.planner.request import Assumptions, PlanRequest, default_supervised_tokens
    from megatron_hgpt.samples import TASKS

    if not (arguments.preset or arguments.config):
        raise ConfigError("name a model: --preset healthgpt_m3, healthgpt_l14 … or --config FILE")
    config = load_resolved(arguments.config, arguments.overrides, arguments.preset)
    training = config.training
    if arguments.stage:
        training.stage = arguments.stage
    elif config.model.hlora.generation is None and training.stage == "stage3_joint":
        training.stage = "stage3_comprehension"  # the model has one plugin; the table's head names the stage
    for name in ("micro_batch_size", "global_batch_size"):
        if (value := getattr(arguments, name)) is not None:
            setattr(training, name, value)
    if arguments.seq_length is not None:
        config.model.max_seq_length = arguments.seq_length
    assumed = {
        name: value
        for name in Assumptions.__dataclass_fields__
        if (value := getattr(arguments, name)) is not None
    }  # fmt: skip
    count = arguments.supervised_tokens
    return PlanRequest(
        config=config,
        cluster=Cluster(
            gpu_name=arguments.gpu,
            gpu=gpu_named(arguments.gpu, {name: getattr(arguments, name) for name in _GPU_FIELDS}),
            num_gpus=arguments.num_gpus,
            gpus_per_node=arguments.gpus_per_node,
        ),
        precision=arguments.precision or training.precision,
        recompute=arguments.recompute or training.recompute or "none",
        distributed_optimizer=not arguments.no_distributed_optimizer,
        supervised_tokens=default_supervised_tokens(config) if count is None else dict.fromkeys(TASKS, count),
        images_per_sample=arguments.images_per_sample,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        context=arguments.context,
        virtual=arguments.virtual,
        first_layers=arguments.first_layers,
        last_layers=arguments.last_layers,
        assumptions=Assumptions(**assumed),
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = build_parser().parse_intermixed_args(argv)
    from megatron_hgpt.errors import ConfigError, HealthGPTError
    from megatron_hgpt.files import write_atomic

    # Models without weights are the point here, and Megatron announces at import what a CPU machine lacks.
    logging.getLogger("megatron_hgpt").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        if arguments.check:
            from megatron_hgpt.planner.measure import check_here

            print(comparison_table(check_here()))
            return 0
        if arguments.top < 1:
            raise ConfigError(f"--top {arguments.top} must be at least 1")
        if arguments.chart and arguments.chart.suffix != ".svg":
            raise ConfigError(f"--chart {arguments.chart}: charts are drawn as .svg; name the file so")
        from megatron_hgpt.planner.chart import memory_chart
        from megatron_hgpt.planner.plan import make_plan
        from megatron_hgpt.planner.report import as_json, table

        plan = make_plan(build_request(arguments))
        print(table(plan, top=arguments.top))
        if arguments.json:
            write_atomic(arguments.json, json.dumps(as_json(plan), indent=1) + "\n")
        if arguments.chart:
            write_atomic(arguments.chart, memory_chart(plan, top=arguments.top))
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
