"""Weights & Biases and MLflow: the calls that a stand-in checks, and the real libraries where they are installed.

Nothing here reaches a network: W&B is offline, MLflow writes files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.mlflow_tracking import MLflowHook
from megatron_hgpt.hooks.weights_and_biases import WeightsAndBiasesHook

NAMES = {
    "loss/all", "loss/comprehension", "loss/generation", "learning_rate/default", "learning_rate/adapter", "grad_norm",
    "throughput/tokens_per_s", "throughput/step_time_s", "throughput/padding_share",
}  # fmt: skip
"""TensorBoard's."""
HELD_OUT = {"validation_loss/all", "validation_loss/comprehension", "validation_loss/generation"}


class FakeWandbRun:
    """Refuses what the real one would: records after the end, steps that go back."""

    def __init__(self, run_id: str) -> None:
        self.id, self.offline, self.dir = run_id, True, "somewhere"  # url: the real one complains when it is offline
        self.records: dict[int, dict[str, float]] = {}
        self.exit_code: int | None = None

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert self.exit_code is None
        assert not self.records or step >= max(self.records)
        self.records.setdefault(step, {}).update(values)

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    """`wandb.init` with exactly the arguments that the hook gives."""

    class Error(Exception):
        pass

    class Settings(SimpleNamespace):
        pass

    def __init__(self) -> None:
        super().__init__(runs=[], inits=[])

    def init(
        self, *, project: str, name: str, id: str | None, resume: str, dir: str, config: dict[str, Any],
        allow_val_change: bool, settings: Any,
    ) -> FakeWandbRun:  # fmt: skip
        assert resume == "allow" and allow_val_change and Path(dir).is_dir()
        self.inits.append((project, name, id, config))
        self.runs.append(FakeWandbRun(id or f"new{len(self.runs)}"))
        return self.runs[-1]


class FakeMlflow(SimpleNamespace):
    """A client over one dictionary; parameters must not change, requests are limited as a server limits them."""

    class MlflowException(Exception):  # noqa: N818  (mlflow's name)
        pass

    def __init__(self, *, is_uri_set: bool = False) -> None:
        super().__init__(runs={}, experiments={}, uris=[], is_down=False)
        self.tracking = SimpleNamespace(is_tracking_uri_set=lambda: is_uri_set)
        self.entities = SimpleNamespace(
            Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
            Param=lambda key, value: (key, value),
        )

    def MlflowClient(self, *, tracking_uri: str | None) -> FakeMlflow:  # noqa: N802  (mlflow's name)
        self.uris.append(tracking_uri)
        return self

    def get_tracking_uri(self) -> str:
        return "http://server"

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        assert name not in self.experiments
        self.experiments[name] = f"id of {name}"
        return self.experiments[name]

    def create_run(self, experiment_id: str, *, run_name: str) -> Any:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(
            experiment=experiment_id, name=run_name, status="RUNNING", params={}, metrics=[]
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, *, status: str) -> None:
        if run_id not in self.runs:
            raise self.MlflowException(f"no run\n{run_id}")
        self.runs[run_id].status = status

    def log_batch(self, run_id: str, *, metrics: Any = (), params: Any = ()) -> None:
        if self.is_down:
            raise self.MlflowException("no\nanswer")
        assert len(params) <= 100 and len(metrics) <= 1000
        run = self.runs[run_id]
        assert run.status == "RUNNING"
        for name, value in params:
            assert isinstance(value, str) and len(value) <= 500
            assert run.params.setdefault(name, value) == value
        for name, value, timestamp_ms, step in metrics:
            assert isinstance(timestamp_ms, int) and timestamp_ms > 1e12
            run.metrics.append((name, value, step))

    def set_terminated(self, run_id: str, *, status: str) -> None:
        if self.is_down:
            raise self.MlflowException("no\nanswer")
        self.runs[run_id].status = status


def test_wandb_gets_scalars_and_configuration(make_state, run_steps, make_validation, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    hook, state = WeightsAndBiasesHook(project="p", interval_steps=3), make_state()
    run_steps([hook], state, last=4, finish=False)
    hook.on_validation(state, make_validation(4))
    hook.on_fit_end(state)
    ((project, name, run_id, config),) = fake.inits
    assert (project, name, run_id) == ("p", "run stage2", None)
    assert config["training"]["seed"] == 1234 and config["name"] == "run"
    (run,) = fake.runs
    assert list(run.records) == [1, 3, 4]
    assert run.records[1].keys() == NAMES
    assert run.records[4].keys() == NAMES | HELD_OUT
    assert run.records[4]["loss/all"] == 1.0 and run.records[4]["validation_loss/all"] == 2.0
    assert run.exit_code == 0


def test_wandb_goes_on_with_a_resumed_run_only(make_state, run_steps, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 2, 0):
        run_steps([WeightsAndBiasesHook(project="p")], make_state(step=step), last=4)
    assert [run.id for run in fake.runs] == ["new0", "new0", "new2"], "a fresh start of the stage is a run of its own"


def test_wandb_failure_and_refusal(make_state, run_steps, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    hook, state = WeightsAndBiasesHook(project="p"), make_state()
    run_steps([hook], state, last=2, finish=False)
    hook.on_error(state, RuntimeError("x"))
    hook.on_fit_end(state)
    assert fake.runs[0].exit_code == 1
    monkeypatch.setattr(fake, "init", mock.Mock(side_effect=fake.Error("api_key not\nconfigured")), raising=False)
    with pytest.raises(
        ConfigError, match=r"logging.wandb_project=p: .*\(api_key not configured\); run `wandb login`, or"
    ):
        hook.on_fit_start(state)


def test_mlflow_gets_scalars_and_parameters(make_state, run_steps, make_validation, monkeypatch, tmp_path) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    hook, state = MLflowHook(experiment="e", interval_steps=3), make_state()
    state.config.data.train = ["x" * 300] * 3
    run_steps([hook], state, last=4, finish=False)
    hook.on_validation(state, make_validation(4))
    hook.on_fit_end(state)
    assert fake.uris == [(tmp_path / "mlruns").as_uri()]
    (run,) = fake.runs.values()
    assert (run.experiment, run.name, run.status) == ("id of e", "run stage2", "FINISHED")
    assert run.params["training.seed"] == "1234" and run.params["model.hlora.generation.lora_rank"] == "256"
    assert {name for name, _, step in run.metrics if step == 1} == NAMES
    assert {name for name, _, step in run.metrics if step == 4} == NAMES | HELD_OUT
    assert {step for *_, step in run.metrics} == {1, 3, 4}
    assert ("validation_loss/generation", 2.5, 4) in run.metrics


def test_mlflow_goes_on_with_a_resumed_run_only(make_state, run_steps, monkeypatch) -> None:
    fake = FakeMlflow(is_uri_set=True)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    run_steps([MLflowHook(experiment="e")], make_state(), last=3)
    assert fake.runs["run0"].status == "KILLED", "stopped before the last step"
    state = make_state(step=2)
    state.config.training.seed = 7  # parameters of the first start stay
    run_steps([MLflowHook(experiment="e")], state, last=4)
    assert (len(fake.runs), fake.runs["run0"].status) == (1, "FINISHED")
    assert fake.uris == [None, None], "MLFLOW_TRACKING_URI decides"
    run_steps([MLflowHook(experiment="e")], make_state(), last=4)
    assert len(fake.runs) == 2


def test_mlflow_failures(make_state, run_steps, make_record, monkeypatch, caplog) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    hook, state = MLflowHook(experiment="e"), make_state()
    run_steps([hook], state, last=2, finish=False)
    fake.is_down = True
    for step in (3, 4):
        state.step = step
        hook.on_step_end(state, make_record(step))
    assert caplog.text.count("MLflow takes no more records from step 3 on: no answer") == 1, "training goes on"
    with pytest.raises(ConfigError, match=r"logging.mlflow_experiment=e: .*\(no answer\); check MLFLOW_TRACKING_URI"):
        MLflowHook(experiment="e").on_fit_start(make_state())
    fake.is_down = False
    hook = MLflowHook(experiment="e")
    hook.on_fit_start(make_state())
    hook.on_error(state, RuntimeError("x"))
    assert list(fake.runs.values())[-1].status == "FAILED"


def test_a_server_that_is_gone_at_the_end_stops_nothing(make_state, run_steps, monkeypatch, caplog) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    hook, state = MLflowHook(experiment="e"), make_state()
    run_steps([hook], state, last=4, finish=False)
    fake.is_down = True
    hook.on_fit_end(state)
    hook.on_error(state, RuntimeError("x"))
    assert caplog.text.count("MLflow was not told that the run is FINISHED: no answer") == 1


def test_a_stored_run_that_the_server_has_no_more_names_its_file(make_state, run_steps, monkeypatch, tmp_path) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    run_steps([MLflowHook(experiment="e")], make_state(), last=3)
    fake.runs.clear()
    file = re.escape(str(tmp_path / "mlflow_run_id"))
    with pytest.raises(ConfigError, match=rf"\(no run run0\); .* instead of run run0, delete {file}$"):
        MLflowHook(experiment="e").on_fit_start(make_state(step=2))


@pytest.mark.parametrize(
    ("module", "hook", "message"),
    [
        ("wandb", WeightsAndBiasesHook(project="p"), r"logging\.wandb_project is set but wandb .*: pip install wandb$"),
        ("mlflow", MLflowHook(experiment="e"), r"logging\.mlflow_experiment is .*: pip install mlflow-skinny$"),
    ],
)
def test_a_missing_package_is_one_line(module, hook, message, make_state, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        hook.on_fit_start(make_state())
    hook.on_fit_start(make_state(is_writer=False))  # the other ranks need no package


REAL = """
import sys
from pathlib import Path
from megatron_hgpt.config import RunConfig
from megatron_hgpt.hooks import StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.mlflow_tracking import MLflowHook
from megatron_hgpt.hooks.weights_and_biases import WeightsAndBiasesHook

hook = {"wandb": WeightsAndBiasesHook(project="p"), "mlflow": MLflowHook(experiment="e")}[sys.argv[1]]
first, last = int(sys.argv[3]), int(sys.argv[4])
state = TrainState(step=first, total_steps=4, stage="stage2", output_dir=Path(sys.argv[2]), is_writer=True,
                   config=RunConfig(), model=None)
hook.on_fit_start(state)
for step in range(first + 1, last + 1):
    state.step = step
    hook.on_step_end(state, StepRecord(
        step=step, loss=4.0 / step, loss_per_task={"comprehension": 4.0 / step}, num_supervised_tokens=1, num_tokens=1,
        num_samples=1, padding_share=0.0, learning_rates={"default": 1e-3}, grad_norm=1.0, step_time_s=1.0,
        tokens_per_s=1.0))
hook.on_validation(state, ValidationRecord(step=last, loss=2.0, loss_per_task={"comprehension": 2.0},
                                           num_samples_per_task={"comprehension": 1}, num_tokens=1, time_s=1.0))
hook.on_fit_end(state)
"""


def _run_twice(library: str, folder: Path) -> None:
    """Three steps, then a resume from step 2, each in a process of its own as a launcher starts them."""
    import os

    for first, last in (("0", "3"), ("2", "4")):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
        environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[3])}
        result = subprocess.run(
            [sys.executable, "-c", REAL, library, str(folder), first, last],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr


def test_the_real_wandb_offline(tmp_path) -> None:
    pytest.importorskip("wandb")
    _run_twice("wandb", tmp_path)
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    logs = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(logs) == 2, "two parts of one run"
    assert b"validation_loss/comprehension" in logs[0].read_bytes()


def test_the_real_mlflow_in_files(tmp_path) -> None:
    mlflow = pytest.importorskip("mlflow")
    _run_twice("mlflow", tmp_path)
    import os

    with mock.patch.dict(os.environ, MLFLOW_ALLOW_FILE_STORE="true"):
        client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
        (experiment,) = (one for one in client.search_experiments() if one.name == "e")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_id == (tmp_path / "mlflow_run_id").read_text().strip()
        history = client.get_metric_history(run.info.run_id, "loss/all")
    assert run.info.status == "FINISHED"
    assert run.data.params["training.seed"] == "1234"
    assert [(metric.step, metric.value) for metric in history] == [(1, 4.0), (2, 2.0), (3, 4 / 3), (3, 4 / 3), (4, 1.0)]
    assert run.data.metrics["validation_loss/all"] == 2.0
