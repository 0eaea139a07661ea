from __future__ import annotations

import json
import math

import pytest

from megatron_hgpt.errors import DataError
from megatron_hgpt.hooks.base import Anomaly
from megatron_hgpt.hooks.metrics import MetricsHook, read_metrics, read_validations, summarise_stage


def test_a_record_holds_the_documented_fields(make_state, run_steps, tmp_path) -> None:
    run_steps([MetricsHook()], make_state(), last=4)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    elapsed = records[1].pop("elapsed_s")
    assert 0 <= elapsed <= records[3]["elapsed_s"]
    assert records[1] == {
        "step": 2,
        "stage": "stage2",
        "loss": 2.0,
        "loss_comprehension": 1.5,
        "loss_generation": 2.5,
        "lr": 1e-3,
        "adapter_lr": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_s": 2000.0,
        "num_supervised_tokens": 60,
        "num_tokens": 200,
        "num_samples": 2,
        "padding_share": 0.25,
        "step_time_s": 0.1,
    }


def test_summary_file(make_state, run_steps, tmp_path) -> None:
    hook = MetricsHook()
    run_steps([hook], make_state(), last=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == hook.summary
    assert summary.pop("wall_s") >= 0
    assert summary == {"stage": "stage2", "steps": 4, "first_loss": 4.0, "last_loss": 1.0, "tokens_per_s": 2000.0}


def test_validations_have_a_file_of_their_own(make_state, run_steps, make_validation, tmp_path) -> None:
    hook, state = MetricsHook(), make_state()
    run_steps([hook], state, last=4, finish=False)
    for step, loss in ((1, math.nan), (2, 2.0), (3, 1.0), (4, 1.5)):
        hook.on_validation(state, make_validation(step, loss))
    hook.on_fit_end(state)
    records = read_validations(tmp_path)
    assert records[1] == {
        "step": 2,
        "stage": "stage2",
        "loss": 2.0,
        "loss_comprehension": 1.5,
        "loss_generation": 2.5,
        "num_samples_comprehension": 12,
        "num_samples_generation": 8,
        "num_supervised_tokens": 90,
        "time_s": 1.25,
    }
    assert records[0]["loss"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: value for name, value in summary.items() if "validation" in name} == {
        "first_validation_loss": None,
        "last_validation_loss": 1.5,
        "best_validation_loss": 1.0,
        "best_validation_step": 3,
    }
    MetricsHook().on_fit_start(make_state(step=2))
    assert [record["step"] for record in read_validations(tmp_path)] == [1, 2], "steps that run again are dropped"
    MetricsHook().on_fit_start(make_state())
    assert not (tmp_path / "validation.jsonl").exists()


def test_throughput_weighs_steps_by_their_time() -> None:
    records = [
        {"loss": 2.0, "num_tokens": 100, "step_time_s": 1.0},
        {"loss": 1.0, "num_tokens": 300, "step_time_s": 3.0},
        {"loss": 1.0, "num_tokens": 400, "step_time_s": 1.0},
    ]
    assert summarise_stage("stage2", records, num_steps=3, wall_s=9.0)["tokens_per_s"] == 160.0  # 800 tokens in 5 s


def test_interval_keeps_first_and_last(make_state, run_steps, tmp_path) -> None:
    run_steps([MetricsHook(interval_steps=3)], make_state(total_steps=7), last=7)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 6, 7]


def test_resume_after_a_kill_has_every_step_once(make_state, run_steps, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_steps([MetricsHook()], make_state(), last=3, finish=False, loss=9.0)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    lines = path.read_text().splitlines()[:2]
    # Steps 1 and 2 are behind the checkpoint; 3 and the half-written 4 run again.
    lines[1] = json.dumps(json.loads(lines[1]) | {"elapsed_s": 1000.0})
    path.write_text("\n".join([*lines, *path.read_text().splitlines()[2:]]))
    run_steps([MetricsHook()], make_state(step=2), last=4)
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 9.0), (2, 9.0), (3, 4 / 3), (4, 1.0)]
    assert records[2]["elapsed_s"] >= 1000.0, "time counts on from the checkpoint"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["first_loss"], summary["last_loss"]) == (9.0, 1.0)
    assert summary["wall_s"] >= 1000.0


def test_a_fresh_start_drops_an_earlier_run(make_state, run_steps, tmp_path) -> None:
    run_steps([MetricsHook()], make_state(), last=4)
    run_steps([MetricsHook()], make_state(), last=1, finish=False, loss=7.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 7.0)]
    assert not (tmp_path / "summary.json").exists()


def test_a_loss_that_is_not_finite_stays_valid_json(make_state, run_steps, tmp_path) -> None:
    run_steps([MetricsHook()], make_state(), last=4, loss=math.nan)
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["loss"] is None
    assert json.loads((tmp_path / "summary.json").read_text())["last_loss"] is None


def test_only_the_writer_writes(make_state, run_steps, tmp_path) -> None:
    run_steps([MetricsHook()], make_state(is_writer=False), last=4)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(path)
    for damaged in ("nonsense", "{}", "[1]", '{"step": "1"}'):
        path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
            read_metrics(path)


def test_steps_stay_unique_and_in_order_over_a_rollback(
    make_state, make_record, make_validation, run_steps, tmp_path
) -> None:
    hook, state = MetricsHook(interval_steps=2), make_state(total_steps=9)
    run_steps([hook], state, last=4, finish=False)
    hook.on_validation(state, make_validation(4))
    state.step = 3
    hook.on_anomaly(state, Anomaly(step=5, kind="not_finite", action="rollback", text="NaN", back_to_step=3))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_validations(tmp_path) == [], "a validation of steps that run again is dropped as well"
    skipped = Anomaly(step=5, kind="not_finite", action="skip", text="NaN again")
    for step in (4, 5, 6):
        state.step = step
        if step == 5:
            hook.on_anomaly(state, skipped)
        hook.on_step_end(state, make_record(step, anomaly=skipped if step == 5 else None))
    hook.on_fit_end(state)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("rolled_back_from"), r.get("action")) for r in lines] == [
        (1, None, None), (2, None, None), (4, 5, None), (5, None, "skip"), (6, None, None),
    ]  # fmt: skip
    anomalies = [json.loads(line) for line in (tmp_path / "anomalies.jsonl").read_text().splitlines()]
    assert anomalies[0] == {
        "stage": "stage2", "step": 5, "kind": "not_finite", "action": "rollback", "text": "NaN", "back_to_step": 3,
    }  # fmt: skip
    assert [a["action"] for a in anomalies] == ["rollback", "skip"]
    assert hook.summary["anomalies"] == {"rollback": 1, "skip": 1}
