"""Whole plans: order, traffic, time, table, JSON, chart, and the command line on a real preset."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config_io import load_config
from megatron_hgpt.planner import communication
from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.chart import memory_chart
from megatron_hgpt.planner.hardware import GPUS, Cluster
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.plan import Plan, make_plan
from megatron_hgpt.planner.report import as_json, override_arguments, table
from megatron_hgpt.planner.request import PlanRequest, default_supervised_tokens
from megatron_hgpt.planner.timing import model_flops_per_step
from megatron_hgpt.samples import Task

ROOT = Path(__file__).parents[3]


def l14(num_gpus: int = 16, **changes: Any) -> PlanRequest:
    config = load_config(preset="healthgpt_l14", overrides=["model.max_seq_length=4096"])
    cluster = Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=num_gpus, gpus_per_node=8)
    defaults = {"supervised_tokens": default_supervised_tokens(config), "context": 1}
    return PlanRequest(config=config, cluster=cluster, **{**defaults, **changes})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(l14())


def test_layouts_that_fit_come_first_and_the_fastest_of_them(plan: Plan) -> None:
    fits = [layout.fits for layout in plan.layouts]
    assert fits == sorted(fits, reverse=True)
    times = [layout.time.total for layout in plan.layouts if layout.fits]
    assert times == sorted(times)
    assert len(times) > 2
    for layout in plan.layouts:
        assert layout.fits == (layout.peak.total <= 79.1 * 2**30)
        assert 0 < layout.mfu < plan.request.assumptions.efficiency
        assert layout.time.total == pytest.approx(sum(dataclasses.asdict(layout.time).values()))


def test_fp8_saves_time_and_not_memory(plan: Plan) -> None:
    narrow = make_plan(l14(precision="fp8", tensor=1, pipeline=2)).layouts[0]
    wide = next(layout for layout in plan.layouts if layout.layout == narrow.layout)
    for before, after, model in zip(wide.memories, narrow.memories, wide.models, strict=True):
        assert after.frozen - before.frozen == 2 * model.count("base_linears")
        assert after.activations > before.activations  # the norms' outputs in FP8
        same = dataclasses.replace(after, frozen=before.frozen, activations=before.activations, working=before.working)
        assert same == before
    assert narrow.time.compute < 0.7 * wide.time.compute


def test_recomputation_trades_memory_for_time(plan: Plan) -> None:
    fast = next(layout for layout in plan.layouts if (layout.layout.tensor, layout.layout.pipeline) == (2, 2))
    lean = make_plan(l14(recompute="full", tensor=2, pipeline=2)).layouts[0]
    assert lean.peak.activations < 0.2 * fast.peak.activations
    assert lean.time.compute > 1.3 * fast.time.compute
    assert lean.traffic_bytes["tensor"] > 1.4 * fast.traffic_bytes["tensor"]
    assert lean.mfu < fast.mfu


def test_flops_follow_the_4n_rule() -> None:
    """L14: backbone, plugins of both tasks by half, head at 256 and 1027 positions."""
    backbone, head = 13_631_902_720, 560_988_160
    plugins = (116_736_000, 450_969_600)
    tokens = sum(0.5 * (4 * backbone + 6 * plugin) * 4096 for plugin in plugins)
    heads = sum(0.5 * 4 * head * count for count in (256, 1027))
    assert model_flops_per_step(l14()) == pytest.approx(128 * (tokens + heads), rel=1e-12)


def test_traffic_of_one_layer_by_hand() -> None:
    """L14, TP2, one micro-batch: eight [4096, 5120] bf16, half of each sent; H-LoRA two u of r, two z of r + k."""
    layout = Layout(tensor=2, pipeline=40, context=1, data=1, layers_per_stage=(1,) * 40)
    sizes = ActivationModel(request=l14(80), layout=layout, task=Task.GENERATION)
    base = communication.tensor_traffic(sizes, 20)
    assert (base.bytes, base.num_messages) == (8 * 4096 * 5120 * 2 / 2, 8)
    branch = communication.hlora_traffic(sizes, 20)
    assert (branch.bytes, branch.num_messages) == (2 * (2 * 128 + 2 * 132) * 4096 * 2 / 2, 8)
    sent = communication.pipeline_traffic(sizes, 20)
    assert (sent.bytes, sent.num_messages) == (2 * 2048 * 5120 * 2, 2)
    assert communication.pipeline_traffic(sizes, 0).num_messages == 1


def test_the_distributed_optimizer_reduces_state_only(plan: Plan) -> None:
    plain = make_plan(l14(distributed_optimizer=False, tensor=2, pipeline=2)).layouts[0]
    sharded = next(layout for layout in plan.layouts if layout.layout == plain.layout)
    ratio = plain.peak.optimizer / sharded.peak.optimizer
    assert ratio == pytest.approx(plain.layout.data, rel=0.01)
    assert plain.peak.frozen == sharded.peak.frozen
    assert plain.peak.gradients == pytest.approx(sharded.peak.gradients, rel=1e-3)


def test_table_and_json_say_the_same(plan: Plan) -> None:
    text = table(plan, top=3)
    data = json.loads(json.dumps(as_json(plan)))
    assert len(data["layouts"]) == len(plan.layouts)
    best = data["layouts"][0]
    assert f"{best['step_s']:.2f}" in text
    assert "50% of the peak" in text
    assert "4N" in text
    for rank in best["pipeline_ranks"]:
        built = sum(group["num_bytes"] for group in rank["parameters"])
        assert rank["frozen"] + rank["trained"] == built
    assert sum("tensor_model_parallel_size=4" in reason for reason in data["refused"]) == 1
    arguments = override_arguments(plan.request, plan.layouts[0])
    assert load_config(preset="healthgpt_l14", overrides=[a.strip("'") for a in arguments])


def test_reasons_are_listed_where_a_size_was_asked_for(plan: Plan) -> None:
    reason = "x parallel.tensor_model_parallel_size=4 cannot"
    assert plan.request.context == 1 and reason in table(plan, top=1)
    free = dataclasses.replace(plan, request=dataclasses.replace(plan.request, context=None))
    count = sum(plan.refused.values())
    assert table(free, top=1).endswith(f"illegal     {count} layouts are not legal; --json lists them with reasons")
    assert reason not in table(free, top=1)


def test_short_steps_are_in_milliseconds(plan: Plan) -> None:
    best = plan.layouts[0]
    time = dataclasses.replace(best.time, **dict.fromkeys(dataclasses.asdict(best.time), 0.001))
    text = table(dataclasses.replace(plan, layouts=[dataclasses.replace(best, time=time)]), top=1)
    assert "step ms" in text and f"  {time.total * 1000:.2f}  " in text
    assert "step s" in table(plan, top=1)


def test_the_chart_is_well_formed_and_as_long_as_the_memory(plan: Plan) -> None:
    root = ElementTree.fromstring(memory_chart(plan, top=2))
    bars = [node for node in root.iter() if node.tag.endswith("rect") and node.get("height") == "18"]
    widths = [float(str(bar.get("width"))) for bar in bars]
    assert len(widths) == 14
    ratio = sum(widths[:7]) / sum(widths[7:])
    assert ratio == pytest.approx(plan.layouts[0].peak.total / plan.layouts[1].peak.total, rel=0.01)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan.py"), *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_line_plans_512_gpus(tmp_path: Path) -> None:
    done = run_tool(
        "--preset", "healthgpt_xl32", "--num-gpus", "512", "--gpu", "h200", "parallel.tensor_model_parallel_size=8",
        "parallel.pipeline_model_parallel_size=2", "training.recompute=full",
        "--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.svg"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "stage3_comprehension" in done.stdout
    # What the user asked beside the layout is part of the recommendation.
    assert re.search(r"best +parallel\.tensor_model_parallel_size=8 .* training\.recompute=full\n", done.stdout)
    assert json.loads((tmp_path / "plan.json").read_text())["layouts"][0]["tensor"] == 8
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "healthgpt_l14", "parallel.tensor_model_parallel_size=4"],
            "cannot shard 40 attention heads with 10",
        ),
        (["--preset", "healthgpt_l14", "--gpu", "h300"], "--gpu 'h300' is unknown"),
        (["--preset", "healthgpt_l14", "--chart", "plan.png"], "charts are drawn as .svg"),
        ([], "name a model"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
