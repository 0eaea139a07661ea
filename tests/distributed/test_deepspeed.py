"""DeepSpeed's engine on two gloo processes: the losses, gradient norms and checkpoints of Megatron's engine.

The two ranks run micro-batches of different tasks, one of them sometimes without an image: what ZeRO's collectives
would mix up or wait for. Each guard of `engines/deepspeed.py` was shown to bite by taking it out: without the zeros for
idle parameters, or with the tower left in at stage 3, the curves differ or the ranks wait for each other for ever.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hgpt.config import CheckpointConfig, EngineConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_hgpt.samples import MicroBatch, Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import FixedLoader, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed installs it"
)

# fp32: the shards' sums are in another order (1e-7 a sum), and five Adam steps amplify it where a gradient is near 0.
RELATIVE = 1e-5
NUM_STEPS = 5
STAGES = ("stage1_joint", "stage2", "stage3_joint")
SHARD_EVERYTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 keeps small parameters whole by default, which are all of a tiny model's."""


def zero(stage: int, **fields: Any) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero_stage=stage, overrides=SHARD_EVERYTHING if stage == 3 else {}, **fields)


ENGINES = {
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "ZeRO-3, small parameters whole": EngineConfig(name="deepspeed", zero_stage=3),
    "ZeRO-1, optimizer on host": zero(1, offload_optimizer="cpu"),
    "ZeRO-2, optimizer on host": zero(2, offload_optimizer="cpu"),
    "ZeRO-3, all on host": zero(3, offload_optimizer="cpu", offload_parameters="cpu"),
}


class LoaderWithTextOnly(FixedLoader):
    """After its first step every second data-parallel rank has a micro-batch without images."""

    def next_step(self) -> list[MicroBatch]:
        batches = super().next_step()
        if self.step > 1 and self.dp_rank % 2 == self.step % 2:
            first = batches[0]
            batches[0] = dataclasses.replace(
                first, image_mask=torch.zeros_like(first.image_mask), pixel_values=first.pixel_values[:0]
            )
        return batches


def make_trainer(config: RunConfig, context: Any) -> Any:
    return build_trainer(config, context, loader_class=LoaderWithTextOnly, num_micro_batches=8)


def make_config(backbone: Path, folder: Path, engine: EngineConfig, **training: Any) -> RunConfig:
    defaults = {"stage": "stage3_joint", "num_steps": NUM_STEPS, "precision": "fp32", "micro_batch_size": 2}
    return tiny_config(
        backbone, folder, engine=engine, training=TrainingConfig(**{**defaults, "global_batch_size": 16, **training})
    )


def initialize() -> Any:
    from megatron_hgpt import distributed

    return distributed.initialize(ParallelConfig(), seed=1)


def steps(trainer: Any, count: int) -> list[float]:
    """Losses and gradient norms in turn."""
    return [
        value for record in (trainer.train_step() for _ in range(count)) for value in (record.loss, record.grad_norm)
    ]


def whole(trainer: Any) -> dict[str, torch.Tensor]:
    """Every tensor that training may change: weights, and what this rank holds of AdamW's state."""
    trained = {name: p for name, p in trainer.models[0].named_parameters() if p.requires_grad}
    with trainer.engine.whole_parameters():
        result = {name: p.detach().clone() for name, p in trained.items()}
        for name, slots in trainer.engine.optimizer_state().parts().items():
            result.update({f"{name}/{slot}": part.tensor.detach().clone() for slot, part in slots.items()})
    return result


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


def curves(backbone: Path, folder: Path, engine: EngineConfig, training: dict[str, Any]) -> dict[str, Any]:
    context = initialize()
    result: dict[str, Any] = {}
    for stage in STAGES:
        trainer = make_trainer(make_config(backbone, folder, engine, stage=stage, **training), context)
        result[stage] = steps(trainer, NUM_STEPS)
    result["held"] = sum(p.numel() for name, p in trainer.models[0].named_parameters() if not p.requires_grad)
    return result


@pytest.fixture(scope="module")
def megatron(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(curves, 2, backbone, tmp_path_factory.mktemp("megatron"), EngineConfig(), {})[0]


@pytest.mark.parametrize("name", ENGINES)
def test_every_stage_has_megatron_s_losses_and_gradient_norms(
    name: str, backbone: Path, megatron: dict[str, Any], tmp_path: Path
) -> None:
    for result in run_ranks(curves, 2, backbone, tmp_path, ENGINES[name], {}):
        for stage in STAGES:
            assert result[stage] == pytest.approx(megatron[stage], rel=RELATIVE), stage
        # Stage 3 with nothing kept whole holds no frozen weight between steps.
        assert (result["held"] == 0) == (ENGINES[name].overrides == SHARD_EVERYTHING)


def test_recomputation_under_stage_3_changes_nothing(backbone: Path, megatron: dict[str, Any], tmp_path: Path) -> None:
    result = run_ranks(curves, 2, backbone, tmp_path, zero(3), {"recompute": "full"})[0]
    for stage in STAGES:
        assert result[stage] == pytest.approx(megatron[stage], rel=RELATIVE), stage


def test_bf16_starts_with_the_same_loss_and_stays_close(backbone: Path, tmp_path: Path) -> None:
    training = {"precision": "bf16"}
    expected = run_ranks(curves, 2, backbone, tmp_path, EngineConfig(), training)[0]
    result = run_ranks(curves, 2, backbone, tmp_path, zero(3), training)[0]
    for stage in STAGES:
        assert result[stage][0] == pytest.approx(expected[stage][0], rel=1e-7), stage
        # Each rank's sums are rounded to bf16 (2^-9) once a step; Adam amplifies that where a gradient is near 0.
        assert result[stage][::2] == pytest.approx(expected[stage][::2], rel=2e-3), stage


def idle_plugin(backbone: Path, folder: Path, engine: EngineConfig) -> set[str]:
    """Groups of which a weight or a moment moved in a step with comprehension only, after two joint steps."""
    from megatron_hgpt.parameters import group_of

    trainer = make_trainer(make_config(backbone, folder, engine), initialize())
    steps(trainer, 2)
    trainer.loader.tasks = (Task.COMPREHENSION,)
    before = whole(trainer)
    steps(trainer, 1)
    moved = {group_of(name) for name, value in whole(trainer).items() if not torch.equal(value, before[name])}
    counts = {group["group"]: group["step"] for group in trainer.engine.optimizer.param_groups}
    assert counts == {
        "abstract_adapter": 3, "hlora_comprehension": 3, "concrete_adapter": 2, "hlora_generation": 2
    }  # fmt: skip
    return moved


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_idle_plugin_does_not_move(stage: int, backbone: Path, tmp_path: Path) -> None:
    for moved in run_ranks(idle_plugin, 2, backbone, tmp_path, zero(stage)):
        assert moved == {"abstract_adapter", "hlora_comprehension"}


def fit(context: Any, config: RunConfig, last_step: int) -> Any:
    """Train (from the newest checkpoint, if any) to a step, with a checkpoint every third one."""
    from megatron_hgpt import distributed

    config.checkpoint = CheckpointConfig(save_interval_steps=3, keep_last=1)
    config.optimizer.schedule = "cosine"
    assert config.model.hlora.comprehension is not None
    config.model.hlora.comprehension.dropout = 0.3
    distributed.seed_everything(context, 1)
    trainer = make_trainer(config, context)
    trainer.total_steps = last_step
    trainer.fit()
    return trainer


def train_and_resume(
    backbone: Path, folder: Path, first: EngineConfig, second: EngineConfig, precision: str
) -> dict[str, float]:
    """Largest difference, per tensor, between six steps of `second` and three of `first` resumed by `second`."""
    context = initialize()

    def config(name: str, engine: EngineConfig) -> RunConfig:
        return make_config(backbone, folder / name, engine, num_steps=6, precision=precision)

    expected = whole(fit(context, config("whole", second), 6))
    fit(context, config("parts", first), 3)
    resumed = fit(context, config("parts", second), 6)
    assert resumed.step == 6
    assert [path.name for path in (folder / "parts" / "checkpoints").iterdir()] == ["step_00000006"]
    return {name: float((value.float() - expected[name].float()).abs().max()) for name, value in whole(resumed).items()}


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_resumed_run_ends_with_the_same_bits(stage: int, precision: str, backbone: Path, tmp_path: Path) -> None:
    for differences in run_ranks(train_and_resume, 2, backbone, tmp_path, zero(stage), zero(stage), precision):
        assert set(differences.values()) == {0.0}
        assert any(name.endswith("/main") for name in differences) == (precision == "bf16")


@pytest.mark.parametrize(
    ("first", "second"),
    [(EngineConfig(), zero(2)), (zero(3), EngineConfig()), (zero(1), zero(3)), (zero(3), zero(2))],
    ids=["Megatron to ZeRO-2", "ZeRO-3 to Megatron", "ZeRO-1 to ZeRO-3", "ZeRO-3 to ZeRO-2"],
)
def test_each_engine_resumes_the_other_s_checkpoint(
    first: EngineConfig, second: EngineConfig, backbone: Path, tmp_path: Path
) -> None:
    for differences in run_ranks(train_and_resume, 2, backbone, tmp_path, first, second, "fp32"):
        # Weights of order 0.1 and six steps of 5e-3; a moment or step count that was lost shows as 1e-3.
        assert max(differences.values()) < 2e-6


def train_and_save(backbone: Path, folder: Path, engine: EngineConfig) -> dict[str, np.ndarray]:
    trained = whole(fit(initialize(), make_config(backbone, folder, engine, num_steps=3), 3))
    return {name: value.numpy() for name, value in trained.items() if "/" not in name}


def load_elsewhere(backbone: Path, folder: Path, run: Path) -> dict[str, np.ndarray]:
    from megatron_hgpt.build import build_model
    from megatron_hgpt.checkpoint import load_weights

    config = make_config(backbone, folder, EngineConfig())
    model = build_model(config, initialize().device)
    load_weights([model], config, [str(run)])
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def test_the_next_stage_starts_from_stage_3_s_weights_on_any_number_of_processes(
    backbone: Path, tmp_path: Path
) -> None:
    trained = run_ranks(train_and_save, 2, backbone, tmp_path / "run", zero(3))[0]
    loaded = run_ranks(load_elsewhere, 1, backbone, tmp_path / "next", tmp_path / "run")[0]
    assert len(trained) > 20
    assert all(np.array_equal(loaded[name], value) for name, value in trained.items())


def fail_on_one_rank(backbone: Path, folder: Path, engine: EngineConfig, where: str) -> None:
    def fail(_grad: torch.Tensor) -> None:
        raise ValueError("no gradient today")

    context = initialize()
    trainer = make_trainer(make_config(backbone, folder, engine), context)
    steps(trainer, 1)
    if context.rank == 1 and where == "forward":
        batches = trainer.loader.next_step()
        batches[1] = dataclasses.replace(batches[1], image_mask=torch.zeros_like(batches[1].image_mask))
        trainer.loader.next_step = lambda: batches
    if context.rank == 1 and where == "backward":  # of the first layer: the others have their gradients
        for name, parameter in trainer.models[0].named_parameters():
            if "layers.0." in name and parameter.requires_grad:
                parameter.register_hook(fail)
    steps(trainer, 1)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("where", "message"),
    [("forward", "0 image positions in the tokens but 8 image features"), ("backward", "no gradient today")],
)
def test_an_error_on_one_rank_is_seen(stage: int, where: str, message: str, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(fail_on_one_rank, 2, backbone, tmp_path, zero(stage), where, timeout_s=60)


def spoil_one_gradient(backbone: Path, folder: Path, engine: EngineConfig) -> str:
    context = initialize()
    trainer = make_trainer(make_config(backbone, folder, engine), context)
    if context.rank == 1:
        parameter = next(p for name, p in trainer.models[0].named_parameters() if "adapters.generation" in name)
        parameter.register_hook(lambda grad: grad * float("nan"))
    before = whole(trainer)
    record = trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(trainer).items()), "nothing moved"
    return f"{record.anomaly.action}: {record.anomaly.text}"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(stage: int, backbone: Path, tmp_path: Path) -> None:
    for seen in run_ranks(spoil_one_gradient, 2, backbone, tmp_path, zero(stage), timeout_s=60):
        assert seen.startswith("skip: every loss is finite, but not the gradient of rank 1; its micro-batches hold ")


def leave_a_step_out(backbone: Path, folder: Path, engine: EngineConfig) -> list[str]:
    """What differs after a step between a run that left a finite one out before it, and one that never had it."""
    context = initialize()
    trained = []
    for leave_out in (True, False):
        trainer = make_trainer(make_config(backbone, folder, engine), context)
        steps(trainer, 1)
        if leave_out:
            trainer.engine.accumulate(trainer.loader.next_step())
            trainer.engine.evaluate(trainer.loader.next_step())
        trainer.loader.load_state_dict({"step": 3})
        steps(trainer, 1)
        trained.append(whole(trainer))
    return [name for name, value in trained[0].items() if not torch.equal(value, trained[1][name])]


@pytest.mark.parametrize("name", [name for name in ENGINES if "whole" not in name])
def test_the_gradient_of_a_step_that_was_left_out_is_in_no_other(name: str, backbone: Path, tmp_path: Path) -> None:
    for different in run_ranks(leave_a_step_out, 2, backbone, tmp_path, ENGINES[name], timeout_s=60):
        assert different == []


def cut_off_a_plugin(backbone: Path, folder: Path, engine: EngineConfig) -> str:
    from megatron_hgpt.errors import HealthGPTError
    from megatron_hgpt.hlora.linear import HLoRALinearMixin

    trainer = make_trainer(make_config(backbone, folder, engine), initialize())
    linear = next(module for module in trainer.models[0].modules() if isinstance(module, HLoRALinearMixin))
    for plugin in linear.hlora.values():
        expand = plugin.expand
        plugin.expand = lambda u, tp_size, expand=expand: expand(u, tp_size).detach()
    with pytest.raises(HealthGPTError) as error:
        trainer.train_step()
    return str(error.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_gradient_audit_sees_a_plugin_that_does_not_train(stage: int, backbone: Path, tmp_path: Path) -> None:
    for message in run_ranks(cut_off_a_plugin, 2, backbone, tmp_path, zero(stage), timeout_s=60):
        assert "trainable parameters received no gradient in their first step" in message
        assert ".hlora." in message


def refused(backbone: Path, folder: Path) -> str:
    from megatron_hgpt.errors import ConfigError

    engine = EngineConfig(name="deepspeed", overrides={"zero_optimization": {"reduce_bucket_size": "many"}})
    with pytest.raises(ConfigError) as error:
        make_trainer(make_config(backbone, folder, engine), initialize())
    return str(error.value)


def test_what_deepspeed_refuses_is_a_configuration_error(backbone: Path, tmp_path: Path) -> None:
    message = run_ranks(refused, 1, backbone, tmp_path)[0]
    assert message.startswith("engine.overrides: DeepSpeed refuses them")
    assert "reduce_bucket_size" in message
