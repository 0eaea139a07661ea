from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_hgpt.batching import data_parallel_size, global_batch_size
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.dry_run import describe
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.stages import STAGES
from megatron_hgpt.validation import find_problems, validate

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RUNS = sorted(CONFIGS.glob("*_stage*.yaml"))
NODE_SIZE = {"tiny": 2, "smollm2": 3, "m3": 8, "l14": 8, "xl32": 8, "deepspeed": 8}
"""Processes that each family of shipped configurations is written for."""


def tiny(*overrides: str) -> RunConfig:
    return load_config(None, ["training.num_steps=10", "training.global_batch_size=8", *overrides], preset="tiny")


def test_the_base_of_these_tests_is_valid() -> None:
    validate(tiny(), 1, check_paths=False)
    validate(tiny("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"), 4, check_paths=False)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ["parallel.tensor_model_parallel_size=3"], "=3 cannot shard 4 attention heads"),
        (3, ["parallel.tensor_model_parallel_size=3"], "use 1, 2, 4"),
        (3, ["parallel.tensor_model_parallel_size=2"], "3 processes cannot hold replicas of 2"),
        (1, ["parallel.tensor_model_parallel_size=0"], "tensor_model_parallel_size=0 must be int (1 to 4096)"),
        (3, ["parallel.pipeline_model_parallel_size=3"], "4 of the 4 layers cannot be split evenly over 3 stages"),
        (2, ["parallel.pipeline_model_parallel_size=2", "parallel.num_layers_in_first_pipeline_stage=4"],
         "0 of the 4 layers cannot be split evenly over 1 stages (num_layers_in_first_pipeline_stage=4)"),
        (1, ["parallel.virtual_pipeline_model_parallel_size=2"], "needs parallel.pipeline_model_parallel_size > 1"),
        (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=4"],
         "virtual_pipeline_model_parallel_size=4 must divide the layers of each stage (2)"),
        (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2",
             "training.global_batch_size=3"], "3 micro-batches per rank: the interleaved schedule needs a multiple"),
        (1, ["parallel.context_parallel_size=0"], "parallel.context_parallel_size=0 must be int (1 to 4096)"),
        (2, ["parallel.context_parallel_size=2", "data.packing=mixed"], "cannot be shared by parallel.context_parall"),
        (1, ["timeouts.step_limit_s=60"],
         "timeouts.step_warning_s=60 must be below timeouts.step_limit_s=60, which ends the run; lower the one"),
        (1, ["timeouts.collective_s=899"], "timeouts.collective_s=899 is below timeouts.step_limit_s=900: torch would"),
        (1, ["training.validation_interval_steps=5"], "validation_interval_steps=5 needs data.validation"),
        (1, ["data.packing=some"], "data.packing='some' must be one of none, by_task, mixed"),
        (1, ["data.pack_length=4096"], "data.pack_length=4096 has no effect without packing"),
        (1, ["data.packing=by_task", "training.micro_batch_size=2"], "micro_batch_size=2 must be 1 with data.packing"),
        (1, ["data.packing=by_task", "data.pack_length=100"], "data.pack_length=100 is below model.max_seq_length="),
        (1, ["data.packing=mixed", "data.mixture={comprehension: 1, generation: 1}"], "pack by_task"),
        (1, ["parallel.sequence_parallel=true"], "sequence_parallel=true needs parallel.tensor_model_parallel_size"),
        (1, ["model.hlora.generation.lora_rank=30"], "generation.lora_rank=30 must be a multiple of num_experts=4"),
        (1, ["model.hlora.generation.num_experts=0"], "model.hlora.generation.num_experts=0 must be int (1 to 1024)"),
        (1, ["model.hlora.comprehension.dropout=1.0"], "model.hlora.comprehension.dropout=1.0"),
        (1, ["model.hlora.generation=null"], "trains generation, but model.hlora.generation is null"),
        (1, ["model.vq.num_codes=0"], "training.stage=stage3_joint draws images, but model.vq.num_codes=0"),
        (1, ["training.micro_batch_size=3"], "global_batch_size=8 must be a multiple of micro_batch_size (3)"),
        (1, ["training.micro_batch_size=0"], "training.micro_batch_size=0 must be int (1 to 4096)"),
        (1, ["training.global_batch_size=0"], "global_batch_size=0 must be int (1 to 65536) or null"),
        (3, [], "x data parallel size (3) = 3"),
        (1, ["training.num_epochs=1"], "set one of training.num_steps=10 and training.num_epochs=1 only"),
        (1, ["training.num_steps=0"], "training.num_steps=0 must be int (1 to 1000000000) or null"),
        (1, ["training.num_steps=null", "training.num_epochs=-1"], "num_epochs=-1 must be float (above 0, at most"),
        (1, ["training.precision=fp16"], "training.precision='fp16' must be one of bf16, fp32, fp8"),
        (1, ["model.transformer_impl=te"], "model.transformer_impl='te' must be one of auto, local, tra"),
        (
            1,
            ["training.precision=fp8", "model.transformer_impl=local"],
            "training.precision=fp8 needs Transformer Engine, but model.transformer_impl=local; set",
        ),
        (1, ["training.recompute=some"], "training.recompute='some' must be one of selective, full or null"),
        (1, ["training.stage=stage4"], "training.stage='stage4' must be one of stage1_comprehension"),
        (1, ["training.new_rows=some"], "training.new_rows='some' must be one of rows, full, none"),
        (1, ["training.stage=stage1_joint", "optimizer.weight_decay=0.1"], "would shrink the frozen rows"),
        (1, ["optimizer.schedule=stairs"], "optimizer.schedule='stairs' must be one of cosine"),
        (1, ["optimizer.lr=-1.0"], "optimizer.lr=-1.0 must be float (0 to 100) or null"),
        (1, ["optimizer.lr=.nan"], "optimizer.lr=nan must be float (0 to 100)"),
        (1, ["optimizer.clip_grad=.inf"], "optimizer.clip_grad=inf must be float (0 to 1000000)"),
        (1, ["optimizer.warmup_ratio=3"], "optimizer.warmup_ratio=3 must be float (0 to 1) or null"),
        (1, ["optimizer.adam_beta1=1.0"], "optimizer.adam_beta1=1.0 must be float (at least 0 and below 1)"),
        (1, ["training.seed=-1"], "training.seed=-1 must be int (0 to 2147483647)"),
        (1, ["training.num_steps=null", "training.num_epochs=.nan"], "num_epochs=nan must be float (above 0, at most"),
        (1, ["training.num_steps=null", "training.num_epochs=.inf"], "num_epochs=inf must be float (above 0, at most"),
        (1, ["model.hlora.generation.alpha=0"], "model.hlora.generation.alpha=0 must be float (above 0, at most"),
        (1, ["model.hlora.comprehension.alpha=.nan"], "comprehension.alpha=nan must be float (above 0, at most"),
        (1, ["checkpoint.save_interval_steps=0"], "checkpoint.save_interval_steps=0 must be int (1 to 1000000000)"),
        (1, ["model.transformer_overrides={hidden_dropout: [1]}"], "hidden_dropout=[1] is not of megatron.core's type"),
        (1, ["model.transformer_overrides={hidden_dropout: .inf}"], "hidden_dropout=inf is not of megatron.core's"),
        (1, ["model.transformer_overrides={init_method: 5}"], "init_method=5 is not of megatron.core's type"),
        (1, ["optimizer.megatron_overrides={log_num_zeros_in_grad: x}"], "log_num_zeros_in_grad='x' is not of"),
        (1, ["model.template=chatty"], "model.template='chatty' must be one of phi3_instruct"),
        (1, ["model.max_seq_length=4096"], "exceeds the backbone's max_position_embeddings=2048"),
        (1, ["model.vision.hf_config.patch_size=0"], "model.vision.hf_config.patch_size=0 must be a positive integer"),
        (1, ["model.vision.generation_hidden_state=4"], "=4 is outside a tower of 3 blocks; use -4 to 3"),
        (1, ["data.mixture={drawing: 1}"], "data.mixture.drawing is unknown; use comprehension and generation"),
        (1, ["data.mixture={generation: -1}"], "data.mixture.generation=-1 must be float (0 to 1000000)"),
        (1, ["data.mixture={generation: 0}"], "leaves training.stage=stage3_joint without samples"),
        (1, ["data.mixture={comprehension: 1}"], "data.mixture has no weight for generation, which stage3"),
        (1, ["model.vision.hf_config.patch_size=65"], "patch_size=65 exceeds image_size=64"),
        (1, ["optimizer.megatron_overrides={lr: 0.1}"], "megatron_overrides.lr is decided by optimizer, parallel"),
        (1, ["model.transformer_overrides={atention_dropout: 0.1}"], "did you mean attention_dropout?"),
        (1, ["optimizer.megatron_overrides={adam_beta: 0.1}"], "did you mean adam_beta"),
    ],
)  # fmt: skip
def test_each_rule(world_size: int, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(tiny(*overrides), world_size, check_paths=False)


def test_a_vocabulary_that_tensor_parallelism_cannot_shard_is_refused() -> None:
    # 49152 + 259 rows; multiples of 512 are not multiples of 3.
    config = load_config(None, ["parallel.tensor_model_parallel_size=3", "model.vocabulary.pad_to_multiple=512",
                                "training.num_steps=1", "training.global_batch_size=1"], preset="smollm2")  # fmt: skip
    with pytest.raises(ConfigError, match="make model.vocabulary.pad_to_multiple a multiple of it"):
        validate(config, 3, check_paths=False)


def test_tensor_parallel_sizes_of_l14_are_named() -> None:
    config = load_config(None, ["parallel.tensor_model_parallel_size=8"], preset="healthgpt_l14")
    with pytest.raises(ConfigError, match="40 attention heads with 10 KV heads .* use 1, 2, 5, 10"):
        validate(config, 8, check_paths=False)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.backbone={}", "model.backbone={} is not a folder"),
        ("model.tokenizer={}", "model.tokenizer={} is not a folder"),
        ("model.vision.tower={}", "model.vision.tower={} is not a folder"),
        ("model.vq.path={}", "model.vq.path={} is not a folder"),
        ("data.train=[{}]", "data.train: {} holds no manifest.json; write it with hgpt preprocess"),
        ("data.validation=[{}]", "data.validation: {} holds no manifest.json"),
        ("checkpoint.init_from=[{}]", "checkpoint.init_from: {} does not exist; train the earlier stage first"),
        ("data.train=[]", "data.train is empty"),
        ("model.tokenizer=null", "set model.tokenizer (or model.backbone"),
    ],
)
def test_paths_must_exist(field: str, message: str, tmp_path: Path) -> None:
    present, absent = tmp_path / "present", str(tmp_path / "absent")
    make_tiny_tokenizer(present)
    (present / "manifest.json").write_text("{}")
    good = [f"model.tokenizer={present}", f"data.train=[{present}]", f"output_dir={tmp_path / 'out'}"]
    validate(tiny(*good), 1)
    with pytest.raises(ConfigError, match=re.escape(message.format(absent))):
        validate(tiny(*good, field.format(absent)), 1)
    assert not (tmp_path / "out").exists()  # checking writes nothing


@pytest.mark.parametrize("name", ["output_dir", "checkpoint.directory"])
def test_a_new_run_is_refused_among_the_checkpoints_of_another(name: str, tmp_path: Path) -> None:
    """Its checkpoints would be pruned among them, and the next start would go on from theirs."""
    directory = tmp_path / "checkpoints"
    (directory / "step_00000007.tmp").mkdir(parents=True)
    place = f"{name}={tmp_path if name == 'output_dir' else directory}"
    fresh = tiny(place, "checkpoint.resume=false")
    assert not [problem for problem in find_problems(fresh, 1) if "resume" in problem]
    (directory / "step_00000007").mkdir()
    (problem,) = (problem for problem in find_problems(fresh, 1) if "resume" in problem)
    assert f"checkpoint.resume=false, but {directory} holds step_00000007 of an earlier run" in problem
    assert "checkpoint.resume=true" in problem
    assert not [problem for problem in find_problems(tiny(place), 1) if "resume" in problem]


@pytest.mark.parametrize(
    ("field", "module", "package"),
    [("wandb_project", "wandb", "wandb"), ("mlflow_experiment", "mlflow", "mlflow-skinny")],
)
def test_a_missing_tracker_is_said_before_anything_starts(
    field: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = tiny(f"logging.{field}=mine")
    validate(config, 1, check_paths=False)
    message = f"logging.{field}=mine needs the package {package}: pip install {package}, or set it to null"
    assert message in find_problems(config, 1)


def test_batch_size_and_replicas() -> None:
    assert global_batch_size(tiny()) == 8
    assert global_batch_size(tiny("training.global_batch_size=null", "training.stage=stage1_generation")) == 64
    assert data_parallel_size(tiny("parallel.tensor_model_parallel_size=2"), 8) == 4


def test_shipped_configurations_are_complete() -> None:
    names = {path.stem for path in RUNS}
    separate = {f"{model}_{stage}" for model in ("m3", "l14") for stage in STAGES if not stage.endswith("joint")}
    xl32 = {"xl32_stage1_comprehension", "xl32_stage3_comprehension"}
    demo = {f"{model}_stage{stage}" for model in ("tiny", "smollm2") for stage in (1, 2, 3)}
    assert names == separate | xl32 | demo | {"deepspeed_l14_stage3_comprehension"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_validates_and_describes(path: Path) -> None:
    config = load_config(path)
    family = path.stem.split("_")[0]
    validate(config, NODE_SIZE[family], check_paths=False)
    text = describe(config, NODE_SIZE[family])
    assert f"stage: {config.training.stage}" in text
    assert config.name == path.stem
    assert Path(config.output_dir).name in (path.stem, path.stem.removeprefix(f"{family}_"))


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.stem[:2] in ("m3", "l1", "xl")], ids=lambda path: path.stem
)
def test_published_hyper_parameters(path: Path) -> None:
    """HealthGPT paper, appendix: learning rates and batch sizes per stage, and the initialisation chain."""
    config = load_config(path)
    family, name = path.stem.split("_", 1)
    stage = STAGES[name]
    expected_lr = {"stage1_comprehension": 1e-3, "stage1_generation": 1e-4 if family == "l14" else 2e-4}.get(name, 2e-4)
    expected_batch = {
        "stage1_comprehension": 256, "stage1_generation": 64, "stage2": 32, "stage3_comprehension": 128,
        "stage3_generation": 64,
    }[name]  # fmt: skip
    main_group = next(group for group in reversed(stage.trainable))
    assert stage.lr_of(main_group, config.optimizer.lr, config.optimizer.adapter_lr) == expected_lr
    assert global_batch_size(config) == expected_batch
    assert config.training.precision == "bf16"
    assert (config.training.num_steps, config.training.num_epochs) == (None, None)  # one epoch
    stages_before = {source.split(f"{family}_", 1)[1] for source in config.checkpoint.init_from}
    assert all((CONFIGS / f"{family}_{before}.yaml").is_file() for before in stages_before)
    assert bool(stages_before) == (not name.startswith("stage1"))


def test_the_dry_run_counts_what_each_stage_trains() -> None:
    """Totals of HealthGPT-M3's groups as the paper's sizes give them."""
    text = describe(load_config(CONFIGS / "m3_stage3_comprehension.yaml"), 8)
    assert re.search(r"^hlora_comprehension +102,891,520  trainable$", text, re.M)
    assert re.search(r"^hlora_generation +404,881,408  frozen$", text, re.M)
    assert re.search(r"^abstract_adapter +12,589,056  trainable$", text, re.M)
    assert re.search(r"^concrete_adapter +12,589,056  frozen$", text, re.M)
    assert re.search(r"115,480,576 trainable", text)
    assert re.search(r"^data parallel size +8$", text, re.M)
    assert re.search(r"^micro-batches per rank +4 of 4 samples$", text, re.M)
    assert re.search(r"^tokens per optimizer step +at most 262,144$", text, re.M)  # 128 samples x 2048
    assert re.search(r"abstract_adapter 2e-05, hlora_comprehension 0.0002$", text, re.M)


def test_the_dry_run_counts_only_the_new_rows_of_stage_1() -> None:
    text = describe(load_config(CONFIGS / "m3_stage1_generation.yaml"), 8)
    assert re.search(r"^embeddings +125,829,120  trainable: 25,175,040 in the VQ rows$", text, re.M)  # 8195 x 3072


def test_the_dry_run_reads_the_length_of_an_epoch_from_the_manifests(tmp_path: Path) -> None:
    folders = []
    for name, counts in (("a", {"comprehension": 9, "generation": 3}), ("b", {"comprehension": 4})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"counts": {"per_task": counts}}))
        folders.append(str(tmp_path / name))
    overrides = ["training.num_steps=null", "training.num_epochs=2", "training.micro_batch_size=2"]
    config = tiny(*overrides, f"data.train={folders}")
    # 13 comprehension and 3 generation samples: 7 + 2 micro-batches, 4 per step, so 3 steps per epoch.
    assert "  6 steps = 48 samples drawn = 3.0 epochs of 16\n" in describe(config, 1)
    assert "warning:" not in describe(config, 1)
    config.training.stage = "stage3_generation"
    assert "  2 steps = 16 samples drawn = 5.3 epochs of 3\n" in describe(config, 1)
    assert (
        "\nwarning: every step repeats samples: training.global_batch_size=8 and there are 3 samples; lower it, or add "
        "data" in describe(config, 1)
    )
    config.training.num_epochs = 0.01  # rounds to no step at all, but a run has one
    assert "  1 step = 8 samples drawn = 2.7 epochs of 3\n" in describe(config, 1)
    config.training.num_epochs, config.training.num_steps = None, 100
    assert "  100 steps = 800 samples drawn = 266.7 epochs of 3\n" in describe(config, 1)
    (tmp_path / "a" / "manifest.json").write_text("{}")
    assert "unreadable manifest" in describe(config, 1)


def test_a_dry_run_imports_no_megatron() -> None:
    import subprocess

    code = (
        "import sys; from megatron_hgpt.cli import main; "
        f"assert main(['train', '--config', {str(CONFIGS / 'm3_stage2.yaml')!r}, '--dry-run']) == 0; "
        "import torch; assert not torch.distributed.is_initialized(); "
        "assert not [name for name in sys.modules if name.startswith(('megatron.core', 'transformers'))]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parents[1], timeout=120
    )
    assert result.returncode == 0, result.stderr
