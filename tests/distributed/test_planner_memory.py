"""The planner's memory of a rank against real ranks: tensor and sequence parallel, and a sharded optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hgpt.config import TrainingConfig
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.measure import Comparison, compare_in_group, small_request
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import tiny_config, write_backbone

# As in the unit test: masks, indices and random states are left out, and weigh more in a small model.
TOLERANCE = 0.10

TP2 = Layout(tensor=2, pipeline=1, context=1, data=1, layers_per_stage=(2,))
DP2 = Layout(tensor=1, pipeline=1, context=1, data=2, layers_per_stage=(2,))


def measure(folder: Path, layout: Layout, recompute: str, precision: str) -> list[Comparison]:
    training = TrainingConfig(stage="stage3_joint", num_steps=1, micro_batch_size=2, global_batch_size=4)
    config = tiny_config(folder / "backbone", folder / "run", training=training)
    for plugin in (config.model.hlora.comprehension, config.model.hlora.generation):
        assert plugin is not None
        plugin.dropout = 0.1
    request = small_request(config, num_gpus=2, recompute=recompute, precision=precision)
    return compare_in_group(request, layout)


@pytest.mark.parametrize(
    ("layout", "recompute", "precision"),
    [(TP2, "none", "fp32"), (TP2, "full", "fp32"), (DP2, "none", "fp32"), (DP2, "none", "bf16")],
    ids=["TP2 + SP", "TP2 + SP recomputed", "DP2 sharded optimizer", "DP2 sharded optimizer bf16"],
)
def test_predictions_hold_on_real_ranks(layout: Layout, recompute: str, precision: str, tmp_path: Path) -> None:
    write_backbone(tmp_path / "backbone")
    ranks = run_ranks(measure, 2, tmp_path, layout, recompute, precision)
    for rows in ranks:
        assert len(rows) == 6
        for row in rows:
            if row.name.startswith("activations"):
                # In bf16 the CPU's RMSNorm keeps an fp32 copy of its input, which a GPU's does not.
                assert precision == "bf16" or abs(row.deviation) < TOLERANCE, row
            elif row.name != "optimizer state":
                assert row.predicted == row.measured, row
    # The prediction is the fullest rank's shard.
    states = [next(row for row in rows if row.name == "optimizer state") for rows in ranks]
    assert max(row.measured for row in states) == states[0].predicted
