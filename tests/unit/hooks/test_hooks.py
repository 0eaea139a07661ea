from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_hgpt.checkpoint import SavedCheckpoint
from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks import Hook, PathParameters, build_hooks
from megatron_hgpt.hooks.base import Anomaly
from megatron_hgpt.hooks.image_samples import ImageSamplesHook
from megatron_hgpt.hooks.tensorboard import TensorBoardHook
from megatron_hgpt.hooks.throughput import ThroughputHook, peak_bf16_flops_per_s
from megatron_hgpt.hooks.watchdog import WatchdogHook


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_base_hook_does_nothing(make_state, make_record, make_validation, tmp_path) -> None:
    hook, state = Hook(), make_state()
    hook.on_fit_start(state)
    hook.on_step_end(state, make_record(1))
    hook.on_validation_start(state)
    hook.on_validation(state, make_validation(1))
    hook.on_checkpoint_saved(state, SavedCheckpoint(path=tmp_path, num_bytes=1, save_time_s=0.1))
    hook.on_fit_end(state)
    hook.on_error(state, RuntimeError("x"))
    assert list(tmp_path.iterdir()) == []


def test_build_hooks_follows_the_configuration() -> None:
    def names(config: RunConfig, **kwargs: object) -> set[str]:
        return {type(hook).__name__ for hook in build_hooks(config, **kwargs)}

    config = RunConfig()
    base = {"ConsoleHook", "MetricsHook"}
    assert names(config) == base | {"TensorBoardHook"}
    watchdog = WatchdogHook(config.timeouts, rank=0, world_size=1, output_dir=Path("unused"))
    assert names(config, watchdog=watchdog) == base | {"TensorBoardHook", "WatchdogHook"}
    config.logging.tensorboard = False
    assert names(config) == base
    assert names(config, sample_images=lambda state: []) == base, "the interval is 0"
    assert type(build_hooks(config)[-1]).__name__ == "ConsoleHook", "its summary comes after all other lines"
    config.logging.sample_images_interval_steps = 5
    config.logging.wandb_project, config.logging.mlflow_experiment = "p", "e"
    parameters = PathParameters(num_frozen=1, num_trained=1)
    assert names(config, sample_images=lambda state: [], parameters=parameters) == base | {
        "ImageSamplesHook",
        "MLflowHook",
        "ThroughputHook",
        "WeightsAndBiasesHook",
    }


def test_tensorboard_scalars_and_resume(make_state, run_steps, make_validation, tmp_path) -> None:
    hook, state = TensorBoardHook(), make_state()
    run_steps([hook], state, last=3, loss=9.0, finish=False)
    hook.on_validation(state, make_validation(3))
    hook.on_fit_end(state)
    assert _scalars(tmp_path, "validation_loss/all") == [(3, 2.0)]
    assert _scalars(tmp_path, "validation_loss/generation") == [(3, 2.5)]
    run_steps([TensorBoardHook()], make_state(step=2), last=4)
    # float32 holds 4/3 to 1e-7.
    losses = _scalars(tmp_path, "loss/all")
    assert [step for step, _ in losses] == [1, 2, 3, 4], "step 3 ran twice and is shown once"
    assert [value for _, value in losses] == pytest.approx([9.0, 9.0, 4 / 3, 1.0], rel=1e-6)
    assert _scalars(tmp_path, "loss/generation")[-1] == (4, 1.25)
    assert _scalars(tmp_path, "learning_rate/adapter")[0][1] == pytest.approx(1e-4)
    assert _scalars(tmp_path, "throughput/tokens_per_s")[0] == (1, 2000.0)


def test_tensorboard_hides_what_a_rollback_runs_again(make_state, make_record, tmp_path) -> None:
    hook, state = TensorBoardHook(), make_state(total_steps=9)
    hook.on_fit_start(state)
    for step in (1, 2, 3):
        state.step = step
        hook.on_step_end(state, make_record(step, loss=9.0))
    state.step = 1
    back = Anomaly(step=4, kind="spike", action="rollback", text="", back_to_step=1)
    hook.on_anomaly(state, back)
    state.step = 2
    hook.on_step_end(state, make_record(2, loss=1.0))
    hook.on_fit_end(state)
    assert _scalars(tmp_path, "loss/all") == [(1, 9.0), (2, 1.0)]


def test_tensorboard_missing_says_what_to_do(make_state, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard, or set logging\.tensorboard=false"):
        TensorBoardHook().on_fit_start(make_state())


def test_sample_images_on_every_rank_written_by_one(make_state, run_steps, tmp_path) -> None:
    calls: list[int] = []

    def draw(state):
        calls.append(state.step)
        return [("reconstruction/ct ../1", Image.new("RGB", (8, 8), (state.step, 0, 0)))]

    run_steps([ImageSamplesHook(interval_steps=2, sample_images=draw)], make_state(is_writer=False), last=4)
    assert calls == [2, 4] and list(tmp_path.iterdir()) == []
    tensorboard = TensorBoardHook()
    images = ImageSamplesHook(interval_steps=3, sample_images=draw, tensorboard=tensorboard)
    run_steps([images, tensorboard], make_state(), last=4)
    files = sorted((tmp_path / "samples").rglob("*.png"))
    assert [str(f.relative_to(tmp_path / "samples")) for f in files] == [
        "step_00000003/000_reconstruction_ct_1.png",
        "step_00000004/000_reconstruction_ct_1.png",
    ]
    with Image.open(files[0]) as image:
        assert image.getpixel((0, 0)) == (3, 0, 0)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [e.step for e in accumulator.Images("reconstruction/ct ../1")] == [3, 4]


def test_4n_rule_by_hand(make_state, run_steps, caplog) -> None:
    hook = ThroughputHook(
        parameters=PathParameters(num_frozen=10, num_trained=5), world_size=2, device_name="NVIDIA H100 80GB HBM3"
    )
    with caplog.at_level(logging.INFO, logger="megatron_hgpt"):
        run_steps([hook], make_state(), last=4)
    # (4*10 + 6*5) FLOPs x 200 tokens in 0.1 s, the two warm-up steps left out.
    assert hook.model_flops_per_s == pytest.approx(70 * 200 / 0.1)
    assert "4N rule (4 x 10 frozen + 6 x 5 trained" in caplog.text
    assert "of 990 TFLOP/s" in caplog.text or "of 989 TFLOP/s" in caplog.text


def test_no_share_of_an_unknown_peak(make_state, run_steps, caplog) -> None:
    hook = ThroughputHook(parameters=PathParameters(num_frozen=10, num_trained=5), device_name="cpu")
    with caplog.at_level(logging.INFO, logger="megatron_hgpt"):
        run_steps([hook], make_state(), last=4)
    assert "4N rule" in caplog.text and "%" not in caplog.text
    caplog.clear()
    state = make_state()
    state.config.training.precision = "fp32"  # the table holds bf16 peaks only
    hook = ThroughputHook(parameters=PathParameters(num_frozen=10, num_trained=5), device_name="NVIDIA A100-SXM4-80GB")
    with caplog.at_level(logging.INFO, logger="megatron_hgpt"):
        run_steps([hook], state, last=4)
    assert "4N rule" in caplog.text and "%" not in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_bf16_flops_per_s(name) == peak
