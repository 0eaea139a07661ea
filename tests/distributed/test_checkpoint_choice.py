"""Which checkpoint real processes read: all the same one, whole, or the one before, and said."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hgpt.checkpoint import choice, open_checkpoint, verify_checkpoint
from megatron_hgpt.checkpoint.choice import open_newest
from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.testing.checkpoints import seal_folder, write_as_format_2
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

TP2 = {"tensor_model_parallel_size": 2}


def make_trainer(backbone: Path, folder: Path, parallel: dict[str, Any], **training: Any) -> Any:
    from megatron_hgpt import distributed

    layout = ParallelConfig(**parallel)
    context = distributed.initialize(layout, seed=1)
    settings = {"stage": "stage3_joint", "num_steps": 4, "micro_batch_size": 2, "global_batch_size": 8, **training}
    config = tiny_config(
        backbone, folder, parallel=layout, training=TrainingConfig(precision="fp32", **settings),
        checkpoint=CheckpointConfig(save_interval_steps=2, keep_last=0),
    )  # fmt: skip
    return build_trainer(config, context)


def fit(backbone: Path, folder: Path, parallel: dict[str, Any], training: dict[str, Any]) -> None:
    make_trainer(backbone, folder, parallel, **training).fit()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


@pytest.fixture(scope="module")
def whole_run(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 4 of two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(fit, 2, backbone, folder, TP2, {})
    return folder


def write_old(source: Path, folder: Path) -> None:
    initialize({})
    for step in ("step_00000002", "step_00000004"):
        write_as_format_2(source / "checkpoints" / step, folder / "checkpoints" / step)


@pytest.fixture(scope="module")
def old_run(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in format 2."""
    folder = tmp_path_factory.mktemp("old")
    run_ranks(write_old, 1, whole_run, folder)
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


class Lines(logging.Handler):
    """What the package says, as texts."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("megatron_hgpt").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def initialize(parallel: dict[str, Any]) -> None:
    from megatron_hgpt import distributed

    distributed.initialize(ParallelConfig(**parallel), seed=1)


def restore(backbone: Path, folder: Path, parallel: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Step, what was said, and sums of the weights, moments and random states after a resume."""
    trainer = make_trainer(backbone, folder, parallel)
    said = Lines()
    restored = trainer.checkpointer.restore_latest(trainer.models, trainer.engine)
    draws = torch.rand(3).tolist()
    sums = {name: float(p.double().sum()) for name, p in trainer.models[0].named_parameters() if p.requires_grad}
    moments = trainer.engine.optimizer_state().parts()
    sums |= {f"{slot} {name}": float(v.tensor.double().sum()) for name, m in moments.items() for slot, v in m.items()}
    return 0 if restored is None else restored.step, said.texts, {**sums, "draws": draws}


def test_formats_2_and_3_restore_the_same(backbone: Path, old_run: Path, run: Path) -> None:
    old = run_ranks(restore, 2, backbone, old_run, TP2)
    new = run_ranks(restore, 2, backbone, run, TP2)
    assert [rank[2] for rank in old] == [rank[2] for rank in new]
    assert all(value != 0 for name, value in old[0][2].items() if name.startswith("exp_avg "))
    assert [rank[0] for rank in old + new] == [4] * 4
    assert "is of format 2 and has no checksums" in old[0][1][0]
    assert not any("checksums" in line for line in new[0][1])


def flip_each_file(run: Path) -> list[tuple[str, str, list[str]]]:
    """(File, checkpoint that is taken, what is said) after one byte of one file was flipped, for every file."""
    initialize(TP2)
    results = []
    newest = run / "checkpoints" / "step_00000004"
    for path in sorted(newest.iterdir()):
        torch.distributed.barrier()
        content = path.read_bytes()
        torch.distributed.barrier()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        if torch.distributed.get_rank() == 0:
            path.write_bytes(bytes(changed))
        torch.distributed.barrier()
        said = Lines()
        found = open_newest(run / "checkpoints")
        assert found is not None
        results.append((path.name, found.folder.name, [*said.texts]))
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            path.write_bytes(content)
    torch.distributed.barrier()
    found = open_newest(run / "checkpoints")
    assert found is not None and found.folder == newest
    return results


def test_a_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_it_used(run: Path) -> None:
    first, second = run_ranks(flip_each_file, 2, run)
    assert [(name, taken) for name, taken, _ in first] == [(name, taken) for name, taken, _ in second]
    names = {name for name, _, _ in first}
    assert {".metadata", "healthgpt.json", "resolved_config.yaml", "__0_0.distcp", "__1_0.distcp"} == names
    for name, taken, said in first:
        assert taken == "step_00000002", name
        (line,) = said
        assert "step_00000004" in line and name in line and line.endswith("step_00000002 is used instead")


def newest(directory: Path, own: dict[int, Path] | None = None, healthy_only: bool = False) -> str:
    """Name of the checkpoint that is chosen, or why none is; ranks may see the directory under a path of their own."""
    initialize({})
    directory = (own or {}).get(torch.distributed.get_rank(), directory)
    try:
        with mock.patch.object(choice, "VIEW_S", 1.0):
            found = open_newest(directory, healthy_only=healthy_only)
    except CheckpointError as error:
        return str(error)
    return "none" if found is None else f"{found.folder.name} of step {found.info['step']}"


def test_a_shard_of_another_step_is_found(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copy(folder / "step_00000002" / "__0_0.distcp", folder / "step_00000004" / "__0_0.distcp")
    assert run_ranks(newest, 2, folder) == ["step_00000002 of step 2"] * 2


def test_a_map_that_says_something_else_is_found(run: Path) -> None:
    """Of the same size, and a pickle as good as the one that was written."""
    path = run / "checkpoints" / "step_00000004" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"optimizer.exp_avg_sq", b"optimizer.exp_avg_xq"))
    assert run_ranks(newest, 2, run / "checkpoints") == ["step_00000002 of step 2"] * 2


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "resolved_config.yaml", "healthgpt.json"])
def test_a_missing_file_is_found(name: str, run: Path) -> None:
    (run / "checkpoints" / "step_00000004" / name).unlink()
    assert run_ranks(newest, 1, run / "checkpoints") == ["step_00000002 of step 2"]


def test_where_all_are_damaged_nothing_begins_anew(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "__0_0.distcp").write_bytes(b"x")
    for message in run_ranks(newest, 2, run / "checkpoints"):
        assert message.startswith(f"none of the 2 checkpoints in {run / 'checkpoints'} can be used: ")
        assert "__0_0.distcp: 1 bytes, healthgpt.json says" in message and "\n" not in message


def test_an_empty_folder_holds_none(tmp_path: Path) -> None:
    assert run_ranks(newest, 2, tmp_path) == ["none"] * 2


def test_a_rollback_takes_the_newest_healthy_one(run: Path) -> None:
    seal_folder(run / "checkpoints" / "step_00000004", is_healthy=False)
    assert run_ranks(newest, 2, run / "checkpoints") == ["step_00000004 of step 4"] * 2
    assert run_ranks(newest, 2, run / "checkpoints", None, True) == ["step_00000002 of step 2"] * 2


def test_a_damaged_healthy_one_does_not_hide_one_that_is_not(run: Path) -> None:
    """A resume asks for a healthy one, and then for any."""
    seal_folder(run / "checkpoints" / "step_00000004", is_healthy=False)
    (run / "checkpoints" / "step_00000002" / "__0_0.distcp").write_bytes(b"x")
    assert run_ranks(newest, 2, run / "checkpoints", None, True) == ["none"] * 2
    assert run_ranks(newest, 2, run / "checkpoints") == ["step_00000004 of step 4"] * 2


def test_a_listing_that_lacks_the_newest_on_one_rank_ends_in_the_same_step_or_an_error(
    run: Path, tmp_path: Path
) -> None:
    """Each rank by itself would take step 4 here and step 2 there."""
    stale = Path(shutil.copytree(run / "checkpoints", tmp_path / "stale"))
    shutil.rmtree(stale / "step_00000004")
    assert run_ranks(newest, 2, run / "checkpoints", {0: stale}) == ["step_00000002 of step 2"] * 2
    for message in run_ranks(newest, 2, run / "checkpoints", {1: stale}):
        assert "ranks do not see the same checkpoint" in message and "rank 1 on " in message
        assert "storage that all nodes share" in message


def test_another_checkpoint_of_that_name_on_one_rank_is_an_error(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run / "checkpoints", tmp_path / "other"))
    seal_folder(other / "step_00000004", stage="stage2")
    for message in run_ranks(newest, 2, run / "checkpoints", {1: other}):
        assert "rank 1 on " in message and "is another one than the first rank's" in message


def newest_that_comes_late(run: Path, stale: Path) -> str:
    """The second rank's file system shows the newest folder two seconds late."""
    initialize(TP2)
    is_late = torch.distributed.get_rank() == 1
    thread = threading.Thread(
        target=lambda: (
            time.sleep(2.0),
            shutil.copytree(run / "checkpoints" / "step_00000004", stale / "step_00000004"),
        )
    )
    if is_late:
        thread.start()
    found = open_newest(stale if is_late else run / "checkpoints")
    assert found is not None
    if is_late:
        thread.join()
    return found.folder.name


def test_a_folder_that_shows_late_is_waited_for(run: Path, tmp_path: Path) -> None:
    stale = Path(shutil.copytree(run / "checkpoints", tmp_path / "stale"))
    shutil.rmtree(stale / "step_00000004")
    assert run_ranks(newest_that_comes_late, 2, run, stale) == ["step_00000004"] * 2


def test_a_resume_takes_the_checkpoint_before_a_damaged_one_on_every_rank(backbone: Path, run: Path) -> None:
    path = run / "checkpoints" / "step_00000004" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    first, second = run_ranks(restore, 2, backbone, run, TP2)
    assert first[0] == second[0] == 2
    assert any("__0_0.distcp" in line and "step_00000002 is used instead" in line for line in first[1])


def named(paths: list[Path]) -> list[str]:
    """What `open_checkpoint` gives for each path."""
    initialize({})
    results = []
    for path in paths:
        try:
            results.append(open_checkpoint(path).folder.name)
        except CheckpointError as error:
            results.append(str(error))
    return results


def test_a_run_folder_gives_its_newest_whole_checkpoint_and_a_named_one_must_be_whole(run: Path) -> None:
    folders = [run, run / "checkpoints", run / "checkpoints" / "step_00000004", run / "nothing"]
    verify_checkpoint(folders[2])
    (run / "checkpoints" / "step_00000004" / "resolved_config.yaml").write_text("")
    (results,) = run_ranks(named, 1, folders)
    assert results[:2] == ["step_00000002"] * 2
    assert "step_00000004 is damaged" in results[2] and results[2].endswith("use another checkpoint")
    assert "holds no complete checkpoint" in results[3]
    with pytest.raises(CheckpointError, match=r"resolved_config\.yaml: 0 bytes"):
        verify_checkpoint(folders[2])


def test_another_layout_draws_masks_that_the_run_has_not_had(backbone: Path, run: Path) -> None:
    """Without that, every resume at another layout would repeat the masks of the first steps."""
    ((_, said, after_4),) = run_ranks(restore, 1, backbone, run, {})
    assert any("goes on at pipeline 1 x tensor 1 x data and context 1: dropout draws anew" in line for line in said)
    ((_, _, again),) = run_ranks(restore, 1, backbone, run, {})
    assert again["draws"] == after_4["draws"], "the same each time"
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    ((_, _, after_2),) = run_ranks(restore, 1, backbone, run, {})
    ((_, _, at_start),) = run_ranks(restore, 1, backbone, run / "new", {})
    draws = [tuple(result["draws"]) for result in (at_start, after_2, after_4)]
    assert len(set(draws)) == 3
    replicas = [tuple(rank[2]["draws"]) for rank in run_ranks(restore, 2, backbone, run, {})]
    assert len({*replicas, *draws}) == 5 - (replicas[0] == draws[1]), "data-parallel ranks draw apart"


def resume_with(backbone: Path, folder: Path, training: dict[str, Any]) -> str:
    trainer = make_trainer(backbone, folder, {}, **training)
    try:
        trainer.checkpointer.restore_latest(trainer.models, trainer.engine)
    except CheckpointError as error:
        return str(error)
    return "resumed"


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"stage": "stage1_generation", "new_rows": "rows"}, {"stage": "stage1_generation", "new_rows": "full"},
         "trained concrete_adapter, hlora_generation, new_rows, this run trains concrete_adapter, hlora_generation, "
         "vocabulary (training.new_rows=full"),
        ({"stage": "stage2"}, {"stage": "stage2", "train_adapters_in_stage2": True},
         "trained vocabulary, this run trains abstract_adapter, concrete_adapter, vocabulary"),
        ({"stage": "stage2", "train_adapters_in_stage2": True}, {"stage": "stage2"}, "this run trains vocabulary"),
    ],
)  # fmt: skip
def test_options_that_decide_what_trains_must_stay(
    before: dict[str, Any], now: dict[str, Any], said: str, backbone: Path, tmp_path: Path
) -> None:
    run_ranks(fit, 1, backbone, tmp_path, {}, {**before, "num_steps": 1})
    (message,) = run_ranks(resume_with, 1, backbone, tmp_path, now)
    assert said in message and "checkpoint.init_from" in message
    assert run_ranks(resume_with, 1, backbone, tmp_path, before) == ["resumed"]


def test_a_description_that_was_changed_by_hand_is_damaged(run: Path) -> None:
    path = run / "checkpoints" / "step_00000004" / "healthgpt.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "step": 3}))
    assert run_ranks(newest, 1, run / "checkpoints") == ["step_00000002 of step 2"]
