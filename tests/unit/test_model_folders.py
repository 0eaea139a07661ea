"""What the model's folders say fills the configuration; what is said beside them must agree, all at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, Phi3Config, Qwen2Config

from megatron_hgpt.cli.frame import run_command
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import Problem, dump, load_config, preset_names, read_config
from megatron_hgpt.demo.checkpoints import write_tiny_clip, write_tiny_phi3
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.dry_run import describe
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model_folders import (
    CLIP_DEFAULTS,
    PUBLISHED,
    load_resolved,
    published_variant,
    resolve_model,
    with_read_problems,
)
from megatron_hgpt.text.templates import chat_template_of
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.validation import validate

MODEL_YAML = """
model:
  target: taming.models.vqgan.GumbelVQ
  params:
    embed_dim: 8
    n_embed: 16
    ddconfig: {z_channels: 8, resolution: 16, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2], num_res_blocks: 1,
               attn_resolutions: []}
"""
"""16 codes, (16 / 2)² = 64 indices."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of 2 layers with its tokenizer, a tower of 3 blocks, a VQGAN's description, a dataset."""
    root = tmp_path_factory.mktemp("folders")
    make_tiny_tokenizer(root / "lm")
    size = TextTokenizer.load(root / "lm").vocab_size
    write_tiny_phi3(root / "lm", text_vocab_size=size + 5, num_layers=2, sliding_window=100)
    write_tiny_clip(root / "clip")
    for name, file, text in (("vqgan", "model.yaml", MODEL_YAML), ("data", "manifest.json", "{}")):
        (root / name).mkdir()
        (root / name / file).write_text(text)
    (root / "run.yaml").write_text(
        f"output_dir: {root / 'run'}\n"
        f"model: {{backbone: {root / 'lm'}, vision: {{tower: {root / 'clip'}}}, vq: {{path: {root / 'vqgan'}}}}}\n"
        f"data: {{train: [{root / 'data'}]}}\n"
        "training: {stage: stage3_joint}\n"
    )
    return root


def test_three_paths_data_and_stage_are_enough(folders: Path) -> None:
    config = load_resolved(folders / "run.yaml")
    validate(config, 1)
    model = config.model
    assert model.hf_config == json.loads((folders / "lm" / "config.json").read_text())
    assert (model.vision.hf_config["hidden_size"], model.vision.num_image_tokens) == (128, 64)
    assert (model.vq.num_codes, model.vq.num_indices) == (16, 64)
    assert (
        model.vocabulary.text_size == TextTokenizer.load(folders / "lm").vocab_size == model.hf_config["vocab_size"] - 5
    )
    assert model.template == "phi3_instruct"
    text = describe(config, 1)
    assert re.search(r"^backbone +\d{3},\d{3}  frozen$", text, re.M)  # and not the billions of a default
    assert re.search(r"^length of the run +1 epoch\b", text, re.M)
    assert "not on this machine" not in text


def test_resolving_again_and_reading_what_was_written_change_nothing(folders: Path, tmp_path: Path) -> None:
    config = load_resolved(folders / "run.yaml")
    before = dump(config)
    assert resolve_model(config) == []
    assert dump(config) == before
    (tmp_path / "resolved_config.yaml").write_text(before)
    assert dump(load_resolved(tmp_path / "resolved_config.yaml")) == before


def test_a_nested_clip_configuration_and_its_defaults(folders: Path, tmp_path: Path) -> None:
    """The published form: a whole CLIP's config.json, without the values that are CLIPVisionConfig's own."""
    defaults = CLIPVisionConfig().to_dict()
    assert {key: defaults[key] for key in CLIP_DEFAULTS} == dict(CLIP_DEFAULTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"image_size": 336}}))
    vision = load_resolved(folders / "run.yaml", [f"model.vision.tower={tmp_path}"]).model.vision
    assert vision.hf_config == {**CLIP_DEFAULTS, "image_size": 336}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"model_type": "sig"}}))
    with pytest.raises(ConfigError, match=r"model\.vision\.tower: .*config\.json describes a 'sig'"):
        load_resolved(folders / "run.yaml", [f"model.vision.tower={tmp_path}"])


@pytest.mark.parametrize("preset", ["healthgpt_m3", "healthgpt_l14", "healthgpt_xl32", "smollm2"])
def test_a_preset_agrees_with_the_folders_that_it_describes(preset: str, tmp_path: Path) -> None:
    """config.json as this transformers writes it, with other keys for the same thing than the preset's."""
    model = load_config(preset=preset).model
    kind = {"Phi3ForCausalLM": Phi3Config, "Qwen2ForCausalLM": Qwen2Config, "LlamaForCausalLM": LlamaConfig}
    architecture = model.hf_config["architectures"][0]
    kind[architecture](**{**model.hf_config, "pad_token_id": None}).save_pretrained(tmp_path / "lm")
    CLIPVisionConfig(**model.vision.hf_config).save_pretrained(tmp_path / "clip")
    written = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert "rope_theta" in written.get("rope_parameters", written)
    folders = [f"model.backbone={tmp_path / 'lm'}", f"model.vision.tower={tmp_path / 'clip'}"]
    resolved = load_resolved(None, [*folders, "model.tokenizer=absent"], preset).model
    assert resolved.hf_config == written
    assert resolved.vocabulary.text_size == model.vocabulary.text_size


WRONG: dict[str, Callable[[Path], str]] = {
    "model.hf_config.num_hidden_layers=5": lambda root: (
        f"model.hf_config.num_hidden_layers=5, but {root}/lm/config.json gives num_hidden_layers=2"
    ),
    "model.hf_config.hidden_act=gelu": lambda root: (
        f"model.hf_config.hidden_act='gelu', but {root}/lm/config.json gives hidden_act='silu'"
    ),
    "model.hf_config.architectures=[LlamaForCausalLM]": lambda root: "gives architectures=['Phi3ForCausalLM']",
    "model.hf_config.rope_theta=500.0": lambda root: (
        f"model.hf_config: rope_theta=500.0, but {root}/lm/config.json gives rope_theta=10000"
    ),
    "model.hf_config.vocab_size=9": lambda root: "model.hf_config.vocab_size=9, but",
    "model.hf_config.sliding_window=null": lambda root: "gives sliding_window=100",
    "model.vision.hf_config.patch_size=16": lambda root: (
        f"model.vision.hf_config.patch_size=16, but {root}/clip/config.json gives patch_size=8"
    ),
    "model.vq.num_codes=8192": lambda root: (
        f"model.vq.num_codes=8192, but {root}/vqgan/model.yaml gives n_embed=16"
    ),
    "model.vq.num_indices=1024": lambda root: "gives indices per image=64",
    "model.vocabulary.text_size=300": lambda root: f"text_size=300, but the tokenizer in {root}/lm has",
    "model.template=qwen_2": lambda root: "ends with <|im_end|>, which the tokenizer in",
    "model.max_seq_length=4096": lambda root: "model.max_seq_length=4096 exceeds the backbone's max_position_embed",
    "model.hlora.generation.lora_rank=30": lambda root: "model.hlora.generation.lora_rank=30 must be a multiple",
    "model.chat_template=qwen_2": lambda root: "model.chat_template=qwen_2 ends with <|im_end|>, which the tokenizer",
    "output_dir=''": lambda root: "output_dir='' names no folder; set it",
    "parallel.pipeline_model_parallel_size=3": lambda root: "1 processes cannot hold replicas of 3",
    "training.precision=fp16": lambda root: "training.precision='fp16' must be one of bf16, fp32, fp8",
    "optimizer.lr=-1": lambda root: "optimizer.lr=-1 must be float (0 to 100) or null",
    "training.sed=1": lambda root: "unknown key training.sed; did you mean training.seed?",
    "data.validation=[absent]": lambda root: "data.validation: absent holds no manifest.json",
    "checkpoint.init_from=[absent]": lambda root: "checkpoint.init_from: absent does not exist",
}  # fmt: skip


def _message(folders: Path, overrides: list[str]) -> str:
    config, read = read_config(folders / "run.yaml", overrides)
    with pytest.raises(ConfigError) as caught:
        validate(config, 1, read=read)
    return str(caught.value)


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_named(override: str, folders: Path) -> None:
    message = _message(folders, [override])
    assert WRONG[override](folders) in message
    if not override.startswith("parallel"):  # which breaks two rules
        assert "\n" not in message


def test_all_wrong_values_are_named_in_one_message(folders: Path) -> None:
    message = _message(folders, list(WRONG))
    for expected in WRONG.values():
        assert expected(folders) in message
    lines = message.splitlines()
    assert lines[0] == f"{len(lines) - 1} problems"
    assert len(lines) - 1 == len(WRONG) + 1  # three pipeline stages fit neither one process nor two layers


def test_what_follows_from_an_unreadable_value_is_not_said_and_the_rest_is(folders: Path) -> None:
    message = _message(folders, ["data.train=5", "model.vq.num_code=3", "model.vq.num_codes=8192"])
    assert "data.train=5 must be a list" in message
    assert "data.train is empty" not in message
    assert "unknown key model.vq.num_code; did you mean model.vq.num_codes?" in message
    assert "model.vq.num_codes=8192, but" in message  # another field than the unknown one


def test_an_unknown_key_hides_no_message_and_a_wrong_value_only_those_of_its_own_name() -> None:
    later = ["model.backbone=x is not a folder", "data.train is empty: name at least one folder", "name=y is long"]
    unknown, wrong = Problem("", "unknown key a"), Problem("data.train", "data.train=5 must be a list")
    assert with_read_problems(later, [unknown]) == [unknown.message, *later]
    assert with_read_problems(later, [wrong]) == [wrong.message, later[0], later[2]]
    assert with_read_problems(later, [Problem("name", "name=5")]) == ["name=5", *later[:2]]
    assert with_read_problems(later, [Problem("data.tra", "data.tra=5")])[1:] == later
    _, read = read_config(None, ["a=1"])
    assert [problem.field for problem in read] == [""]


LIKE_L14 = {
    "architectures": ["Phi3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 10, "max_position_embeddings": 16384, "rope_theta": 250000.0,
    "vocab_size": 100352,
}  # fmt: skip


def test_a_backbone_of_a_published_shape_brings_its_ranks_and_learning_rates(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LIKE_L14))
    overrides = [f"model.backbone={tmp_path}", f"model.tokenizer={folders / 'lm'}", "training.stage=stage1_generation"]
    config = load_resolved(folders / "run.yaml", overrides)
    assert config.model.hlora == load_config(preset="healthgpt_l14").model.hlora != RunConfig().model.hlora
    assert config.optimizer.lr == 1e-4
    assert "shape of the backbone           HealthGPT-L14's" in describe(config, 1)
    mine = [*overrides, "model.hlora.comprehension.lora_rank=16", "optimizer.lr=5e-4"]
    config = load_resolved(folders / "run.yaml", mine)
    assert config.model.hlora.comprehension is not None
    assert (config.model.hlora.comprehension.lora_rank, config.model.hlora.comprehension.alpha) == (16, 64.0)
    assert config.optimizer.lr == 5e-4
    assert load_resolved(folders / "run.yaml", [*overrides, "training.stage=stage2"]).optimizer.lr is None
    (tmp_path / "config.json").write_text(json.dumps({**LIKE_L14, "num_hidden_layers": 39}))
    config = load_resolved(folders / "run.yaml", overrides)
    assert (config.model.hlora, config.optimizer.lr) == (RunConfig().model.hlora, None)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_shape_that_it_is_told_by(preset: str) -> None:
    assert published_variant(load_config(preset=preset).model) == preset
    assert published_variant(load_config(preset="tiny").model) is None


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_states_its_template_and_stage_1_comprehension_stays_plain(preset: str) -> None:
    templates = []
    for stage in ("stage1_comprehension", "stage3_comprehension"):
        config = load_config(None, [f"training.stage={stage}"], preset)
        assert resolve_model(config) == []
        templates.append(config.model.template)
    assert templates == ["plain", config.model.chat_template] and config.model.chat_template is not None


def test_a_dry_run_names_the_data_and_checkpoints_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.train=[nowhere]", "checkpoint.init_from=[gone]", "training.num_steps=1"]
    assert run_command("train", ["--preset", "tiny", "--dry-run", *overrides]) == 0
    block = capsys.readouterr().out.split("# not here\n\n")[1].splitlines()
    assert [line.split(";")[0] for line in block] == [
        "data.train: nowhere holds no manifest.json",
        "checkpoint.init_from: gone does not exist",
    ]


def test_all_missing_folders_are_named_in_one_message(folders: Path) -> None:
    paths = ["model.backbone", "model.vision.tower", "model.vq.path"]
    message = _message(folders, [f"{path}=absent" for path in paths])
    for path in paths:
        assert f"{path}=absent is not a folder" in message
    assert len(message.splitlines()) == 4
    with pytest.raises(ConfigError, match="4 problems|3 problems"):  # nothing but these folders says the sizes
        load_resolved(folders / "run.yaml", [f"{path}=absent" for path in paths])


def test_a_dry_run_reads_the_folders_that_are_here_and_names_the_others(folders: Path) -> None:
    overrides = [f"model.vision.tower={folders / 'clip'}", "model.backbone=absent"]
    config = load_config(None, overrides, preset="healthgpt_m3")
    with pytest.raises(ConfigError, match=r"model\.vision\.hf_config\.hidden_size=1024, but .* gives hidden_size=128"):
        validate(config, 1, check_paths=False)
    config = load_config(None, overrides[1:], preset="healthgpt_m3")
    validate(config, 1, check_paths=False)
    text = describe(config, 1)
    assert "# not on this machine, taken as the configuration describes them\n\nmodel.backbone=absent" in text


@pytest.mark.parametrize(
    ("folder", "file", "content", "message"),
    [
        ("lm", "config.json", "{", r"model\.backbone: cannot read .*config\.json: "),
        (
            "lm",
            "tokenizer_config.json",
            '{"bos_token": "<bos>"}',
            r"model\.backbone: bos_token='<bos>' in .* is no entry",
        ),
        ("vqgan", "model.yaml", "- model", r"model\.vq\.path: .*model\.yaml holds a list; it needs a mapping"),
        ("lm", "config.json", '{"architectures": ["GPT2LMHeadModel"]}', r"model\.backbone: .*'GPT2LMHead"),
        ("lm", "tokenizer.json", "{}", r"model\.backbone: .*tokenizer\.json: no tokenizer can be loaded"),
        ("clip", "config.json", "[]", r"model\.vision\.tower: .*config\.json holds a list"),
        ("vqgan", "model.yaml", "model: [\n- {", r"model\.vq\.path: .*model\.yaml is not YAML"),
        ("vqgan", "model.yaml", "model: {}", r"model\.vq\.path: .*model\.yaml lacks"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named_in_one_line(
    folder: str, file: str, content: str, message: str, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / folder, tmp_path / folder)
    (tmp_path / folder / file).write_text(content)
    key = {"lm": "model.backbone", "clip": "model.vision.tower", "vqgan": "model.vq.path"}[folder]
    text = _message(folders, [f"{key}={tmp_path / folder}"])
    assert re.match(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("lm", "rope_theta", float("nan"), "model.backbone: .*rope_theta=nan is not supported"),
        ("lm", "rope_parameters", {"rope_theta": float("nan")}, "model.backbone: .*rope_theta=nan is not supported"),
        ("clip", "num_attention_heads", 0, "model.vision.hf_config.num_attention_heads=0 must be a positive integer"),
        ("clip", "num_attention_heads", 3, "model.vision.hf_config.num_attention_heads=3 must divide hidden_size=128"),
    ],
)
def test_a_value_of_a_folder_that_no_model_can_have_is_named(
    folder: str, key: str, value: Any, message: str, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / folder, tmp_path / folder)
    content = json.loads((tmp_path / folder / "config.json").read_text())
    for section in (content, content.get("vision_config", {})):
        section[key] = value
    (tmp_path / folder / "config.json").write_text(json.dumps(content))
    name = {"lm": "model.backbone", "clip": "model.vision.tower"}[folder]
    assert re.match(
        message, _message(folders, [f"{name}={tmp_path / folder}", "model.tokenizer=" + str(folders / "lm")])
    )


def test_preprocessing_names_all_that_is_missing_in_one_message(folders: Path, tmp_path: Path) -> None:
    overrides = ["model.backbone=absent", "model.vq.path=gone", "seed", "training.seed=x"]
    arguments = ["--config", str(folders / "run.yaml"), "--input", "no.json", "--image-root", "nowhere"]
    with pytest.raises(ConfigError) as caught:
        run_command("preprocess", [*arguments, "--output", str(tmp_path / "out"), *overrides])
    lines = str(caught.value).splitlines()
    for expected in (
        "override 'seed' is not of the form",
        "training.seed='x' must be int",
        "model.backbone=absent is not a folder",
        "model.vq.path=gone is not a folder",
        "--input no.json is not a file",
        "--image-root nowhere is not a folder",
    ):
        assert sum(expected in line for line in lines) == 1, expected
    assert len(lines) == 7


def test_a_dataset_of_another_template_is_named_before_anything_is_built(folders: Path, tmp_path: Path) -> None:
    manifest = {"template": {"name": "plain", "system_prompt": ""}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = _message(folders, [f"data.train=[{tmp_path}]"])
    assert f"{tmp_path}: template of the dataset is 'plain', the run's is 'phi3_instruct'" in text
    assert "or set model.template=plain" in text


def test_a_configuration_built_in_python_is_checked_as_well(folders: Path) -> None:
    config: Any = load_config(folders / "run.yaml")
    config.training.micro_batch_size, config.optimizer.schedule = 0, "stairs"
    with pytest.raises(ConfigError) as caught:
        validate(config, 1)
    assert "training.micro_batch_size=0 must be int (1 to 4096)" in str(caught.value)
    assert "optimizer.schedule='stairs' must be one of cosine, linear, constant or null" in str(caught.value)


def test_without_folders_each_missing_size_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig(), 1, check_paths=False)
    for name in ("model.backbone is not set", "model.vision.tower is not set", "set model.tokenizer"):
        assert name in str(caught.value)


def test_a_run_that_draws_nothing_needs_no_vqgan(folders: Path) -> None:
    none = ["model.vq={path: null, num_codes: 0, num_indices: 0}", "training.stage=stage3_comprehension"]
    config = load_resolved(folders / "run.yaml", none)
    validate(config, 1)
    assert (config.model.vq.num_codes, config.model.vq.num_indices) == (0, 0)
    assert "num_codes=0" in _message(folders, none[:1])  # stage3_joint draws
    unsaid = load_resolved(folders / "run.yaml", ["model.vq.path=null"])
    assert (unsaid.model.vq.num_codes, unsaid.model.vq.num_indices) == (8192, 1024)


@pytest.mark.parametrize(
    ("stage", "given", "template"),
    [
        ("stage1_comprehension", None, "plain"),
        ("stage1_comprehension", "phi3_instruct", "phi3_instruct"),
        ("stage1_generation", None, "phi3_instruct"),
        ("stage1_joint", None, "phi3_instruct"),
        ("stage2", None, "phi3_instruct"),
        ("stage3_comprehension", "plain", "plain"),
    ],
)
def test_the_template_follows_the_stage_unless_it_is_set(
    stage: str, given: str | None, template: str, folders: Path
) -> None:
    overrides = [f"training.stage={stage}", *([f"model.template={given}"] if given else [])]
    assert load_resolved(folders / "run.yaml", overrides).model.template == template


@pytest.mark.parametrize(
    ("tokens", "family", "description", "template"),
    [
        (["<|assistant|>", "<|end|>"], "llama", "", "phi3_instruct"),
        (["<|im_start|>", "<|im_end|>", "<|im_sep|>"], "phi3", "", "phi4_instruct"),
        (["<|im_start|>", "<|im_end|>"], "qwen2", "", "qwen_2"),
        (["<|im_start|>", "<|im_end|>"], "llama", "an assistant named SmolLM", "smollm2"),
        (["<|im_start|>", "<|im_end|>"], "llama", "", None),
        (["<|eot_id|>"], "llama", "", None),
    ],
)
def test_the_chat_template_is_told_from_the_tokenizer(
    tokens: list[str], family: str, description: str, template: str | None
) -> None:
    assert chat_template_of(tokens, family, description) == template


def test_a_template_that_cannot_be_told_is_asked_for(folders: Path, tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|assistant|>", "<|helper|>"))
    with pytest.raises(ConfigError, match="model.template cannot be told from the tokenizer in .* phi3_instruct, phi4"):
        load_resolved(folders / "run.yaml", [f"model.tokenizer={tmp_path}"])
    overrides = [f"model.tokenizer={tmp_path}", "training.stage=stage1_comprehension"]
    assert load_resolved(folders / "run.yaml", overrides).model.template == "plain"


def test_a_tokenizer_with_more_entries_than_the_backbone_has_rows_is_refused(folders: Path, tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path, texts=[f"number {i} of {i * i} words" for i in range(300)], vocab_size=600)
    size = TextTokenizer.load(tmp_path).vocab_size
    rows = json.loads((folders / "lm" / "config.json").read_text())["vocab_size"]
    assert size > rows
    with pytest.raises(ConfigError, match=f"text_size={size} exceeds vocab_size={rows} .* belongs to another model"):
        load_resolved(folders / "run.yaml", [f"model.tokenizer={tmp_path}"])
