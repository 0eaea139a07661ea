"""Transformer Engine's layers on a GPU against the local ones, in bf16 and FP8, and one step of the full M3 shape.

Each case runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.samples import IGNORE_INDEX, MicroBatch, Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import FixedLoader, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed (docs/gpu.md)"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# bf16 keeps 8 bits: each rounding is up to 0.4 %. Both implementations round at other places of some fifty products
# and sums between loss and first layer, so single entries differ freely; whole gradients by sqrt(50) * 0.2 % = 1.5 %.
# Adam's sign-like steps then move near-zero entries apart, which doubles it within three steps.
BF16_LOSS, BF16_GRADIENT = 1e-2, 5e-2
# E5M2 gradients keep 2 bits (7 % rms per entry), E4M3 weights 3 bits (3 % rms): 8 % of the norm in a random sum.
FP8_INPUT_GRADIENT = 0.12
FP8_LOSS = 0.02

LOCAL, TE = "local", "transformer_engine"
Curve = list[tuple[float, dict[str, torch.Tensor]]]


class CyclingLoader(FixedLoader):
    """The same five steps again and again, so that there is something to learn."""

    def next_step(self) -> list[MicroBatch]:
        self.step %= 5
        return super().next_step()


def build(folder: Path, impl: str, precision: str, parallel: dict[str, Any], num_steps: int) -> Any:
    from megatron_hgpt import distributed

    layout = ParallelConfig(**parallel)
    context = distributed.initialize(layout, seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=num_steps, precision=precision, micro_batch_size=2, global_batch_size=8
    )
    config = tiny_config(
        folder / "backbone", folder / impl, parallel=layout, training=training,
        checkpoint=CheckpointConfig(directory=str(folder / "checkpoints"), save_interval_steps=1000),
    )  # fmt: skip
    config.model.transformer_impl = impl
    return build_trainer(config, context, loader_class=CyclingLoader)


def train(
    folder: Path, impl: str, precision: str, parallel: dict[str, Any], num_steps: int, with_gradients: bool
) -> Curve:
    """Loss of each step, with the gradient of every trained parameter under the local spec's name."""
    from megatron_hgpt.backbone.names import unfused_name

    trainer = build(folder, impl, precision, parallel, num_steps)
    curve: Curve = []
    for _ in range(num_steps):
        loss = trainer.train_step().loss
        gradients = {
            unfused_name(name): parameter.main_grad.float().cpu()
            for name, parameter in trainer.models[0].named_parameters()
            if with_gradients and parameter.requires_grad
        }
        curve.append((loss, gradients))
    return curve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "backbone")
    return tmp_path


@needs_engine
def test_three_steps_in_bf16_equal_the_local_layers(folder: Path) -> None:
    local, engine = (run_ranks(train, 1, folder, impl, "bf16", {}, 3, True)[0] for impl in (LOCAL, TE))
    for step, ((expected, gradients), (loss, mine)) in enumerate(zip(local, engine, strict=True)):
        assert loss == pytest.approx(expected, rel=BF16_LOSS), step
        assert mine.keys() == gradients.keys() and mine
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, name
            assert (mine[name] - gradient).norm() / gradient.norm() < BF16_GRADIENT, (step, name)


@needs_engine
def test_fifty_steps_in_fp8_stay_within_two_percent_of_bf16(folder: Path) -> None:
    bf16, fp8 = (run_ranks(train, 1, folder, TE, precision, {}, 50, False)[0] for precision in ("bf16", "fp8"))
    worst = max(abs(mine - loss) / loss for (loss, _), (mine, _) in zip(bf16, fp8, strict=True))
    print(f"\nlargest deviation of 50 FP8 losses from bf16: {worst:.2%}")
    assert bf16[-1][0] < bf16[0][0], "nothing was learnt: the comparison would be of noise"
    assert 0 < worst < FP8_LOSS


def input_gradients() -> tuple[float, float]:
    """Relative difference of outputs and of input gradients, FP8 against bf16, of one QKV of 1024 features."""
    import transformer_engine.pytorch as te
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.common.recipe import Float8CurrentScaling

    from megatron_hgpt import distributed
    from megatron_hgpt.config import HLoRAPluginConfig
    from megatron_hgpt.hlora.plugins import BranchLayout
    from megatron_hgpt.hlora.te_linear import HLoRATELayerNormColumnParallelLinear

    distributed.initialize(ParallelConfig(), seed=1)
    config = TransformerConfig(
        num_layers=1, hidden_size=1024, num_attention_heads=16, normalization="RMSNorm", bf16=True,
        params_dtype=torch.bfloat16, gradient_accumulation_fusion=False,
    )  # fmt: skip
    layer = HLoRATELayerNormColumnParallelLinear(
        1024, 3072, config=config, init_method=torch.nn.init.xavier_normal_, gather_output=False, bias=False,
        skip_bias_add=True, is_expert=False, tp_comm_buffer_name="qkv",
        hlora_plugins={Task.COMPREHENSION: HLoRAPluginConfig(dropout=0.0)},
        hlora_layout=BranchLayout(part_sizes=(3072,)),
    )  # fmt: skip
    layer.active_task = Task.COMPREHENSION
    for parameter in layer.hlora.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.weight.requires_grad_(False)
    layer.layer_norm_weight.requires_grad_(False)
    x0, dy = torch.randn(256, 2, 1024, device="cuda").bfloat16(), torch.randn(256, 2, 3072, device="cuda").bfloat16()
    results = []
    for enabled in (False, True):
        x = x0.clone().requires_grad_()
        with te.fp8_autocast(enabled=enabled, fp8_recipe=Float8CurrentScaling()):
            y, _ = layer(x)
        y.backward(dy)
        assert layer.weight.grad is None and x.grad is not None
        results.append((y.detach().float(), x.grad.float()))
    output, gradient = (float((b - a).norm() / a.norm()) for a, b in zip(*results, strict=True))
    return output, gradient


@needs_engine
def test_the_input_gradient_of_a_layer_in_fp8() -> None:
    output, gradient = run_ranks(input_gradients, 1)[0]
    print(f"\nFP8 against bf16, one QKV: output {output:.2%}, input gradient {gradient:.2%} of the norm")
    assert 1e-4 < output < FP8_INPUT_GRADIENT, "below, FP8 did not run"
    assert 1e-4 < gradient < FP8_INPUT_GRADIENT


def weights(folder: Path, impl: str, num_steps: int) -> dict[str, torch.Tensor]:
    """Trained weights after `num_steps` steps and a save, or (0 steps) after restoring the newest checkpoint."""
    from megatron_hgpt.backbone.names import unfused_name

    trainer = build(folder, impl, "bf16", {}, num_steps)
    if num_steps:
        trainer.fit()
    else:
        assert trainer.checkpointer.restore_latest(trainer.models, trainer.engine) is not None
    named = trainer.models[0].named_parameters()
    return {unfused_name(name): p.detach().cpu() for name, p in named if p.requires_grad}


@needs_engine
@pytest.mark.parametrize(("saved", "loaded"), [(LOCAL, TE), (TE, LOCAL)])
def test_a_checkpoint_of_one_is_read_by_the_other(saved: str, loaded: str, folder: Path) -> None:
    expected = run_ranks(weights, 1, folder, saved, 2)[0]
    mine = run_ranks(weights, 1, folder, loaded, 0)[0]
    assert expected.keys() == mine.keys()
    assert all(torch.equal(expected[name], mine[name]) for name in expected)


@needs_engine
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} GPUs; two are needed")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_two_gpus_give_the_losses_of_one(precision: str, folder: Path) -> None:
    expected = run_ranks(train, 1, folder, TE, precision, {}, 5, False)[0]
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for curve in run_ranks(train, 2, folder, TE, precision, parallel, 5, False):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=FP8_LOSS)


def m3_batches(config: Any) -> Iterator[MicroBatch]:
    """One full-length sample with one picture, per task."""
    vision, length = config.model.vision, config.model.max_seq_length
    for task in Task:
        tokens = torch.randint(0, config.model.vocabulary.text_size, (1, length))
        image_mask = torch.zeros(1, length, dtype=torch.bool)
        image_mask[:, 8 : 8 + vision.num_image_tokens] = True
        labels = tokens.clone()
        labels[:, : 8 + vision.num_image_tokens] = IGNORE_INDEX
        size = vision.hf_config["image_size"]
        yield MicroBatch(
            task=task, tokens=tokens, labels=labels, position_ids=torch.arange(length).expand(1, length),
            image_mask=image_mask, pixel_values=torch.randn(1, 3, size, size), sample_ids=[task.value],
            num_supervised_tokens=int((labels != IGNORE_INDEX).sum()), num_content_tokens=length,
        )  # fmt: skip


def m3_step(folder: Path, precision: str) -> tuple[float, float, float]:
    """Peak memory (GiB), time of the third step (s) and its loss, of stage 3 at the full M3 shape, random weights."""
    from megatron_hgpt import cpu_platform, distributed
    from megatron_hgpt.build import build_model_chunks, freeze_except
    from megatron_hgpt.checkpoint import Checkpointer
    from megatron_hgpt.stages import resolve_stage
    from megatron_hgpt.trainer import Trainer

    config = load_config(preset="healthgpt_m3", overrides=[])
    config.output_dir = str(folder)
    config.model.backbone, config.model.vision.tower = None, None
    config.training = dataclasses.replace(
        config.training, stage="stage3_joint", num_steps=3, num_epochs=None, micro_batch_size=1, global_batch_size=2,
        precision=precision,
    )  # fmt: skip
    context = distributed.initialize(config.parallel, seed=1)
    assert not hasattr(torch.cuda, cpu_platform._MARK), "the CPU replacements are active on a GPU"
    stage = resolve_stage(config.training)
    models = build_model_chunks(config, context.device)
    freeze_except(models, stage.trainable)
    batches = list(m3_batches(config))

    class Loader(FixedLoader):
        def next_step(self) -> list[MicroBatch]:
            return batches

    trainer = Trainer(
        config=config, stage=stage, context=context, models=models, total_steps=3,
        loader=Loader(stage.tasks, num_micro_batches=2, dp_rank=0, dp_size=1),
        checkpointer=Checkpointer(config, trained_groups=stage.trainable, is_writer=True),
    )  # fmt: skip
    for _ in range(2):
        trainer.train_step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    loss = trainer.train_step().loss
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30, time.perf_counter() - started, loss


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 70 * 2**30,
    reason="the full M3 shape without recomputation needs a GPU of 80 GB",
)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=needs_engine)])
def test_a_step_of_the_full_m3_shape(precision: str, tmp_path: Path) -> None:
    memory, seconds, loss = run_ranks(m3_step, 1, tmp_path, precision, timeout_s=550.0)[0]
    print(
        f"\nM3, stage 3, {precision}, {torch.cuda.get_device_name()}: 2 x 1 samples of the full length, "
        f"{seconds:.2f} s a step, {memory:.1f} GiB at the peak, loss {loss:.3f}"
    )
    assert 0 < loss < 20
