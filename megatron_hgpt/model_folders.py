"""Three paths instead of twenty settings: what the model's folders say about themselves, filled into a configuration.

`model.backbone`, `model.vision.tower`, `model.vq.path` and the tokenizer beside the backbone give the sizes of the
model. What a YAML, a preset or an override says as well must agree; a disagreement names both values. A folder that is
not here is no problem as long as the configuration says its sizes: a shipped configuration names a user's folders.
Only descriptions are read, never weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.config import ModelConfig, RunConfig, VisionConfig, VQConfig
from megatron_hgpt.config_io import Problem, load_config, read_config
from megatron_hgpt.errors import CheckpointError, ConfigError, HealthGPTError, raise_problems, shown
from megatron_hgpt.files import read_json
from megatron_hgpt.stages import LEARNING_RATES
from megatron_hgpt.text.templates import TEMPLATES, chat_template_of
from megatron_hgpt.text.tokenizer import has_dummy_space, read_tokenizer, vocabulary_of

DEFAULT_CODES, DEFAULT_INDICES = 8192, 1024
"""Codebook and indices per image without a VQGAN folder: those of the OpenImages f=8 VQGAN that HealthGPT uses."""

CLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What is read of a tower, with CLIPVisionConfig's own defaults: transformers leaves a value out where it has them."""

MOST_IDS = 2**22
"""Ids of a vocabulary, as `model.vocabulary.text_size` has at most: each is a row of two matrices."""

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


PUBLISHED: Mapping[str, str] = {
    "healthgpt_m3": "HealthGPT-M3",
    "healthgpt_l14": "HealthGPT-L14",
    "healthgpt_xl32": "HealthGPT-XL32",
}
"""Preset -> the published model that it describes."""


def load_resolved(
    path: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None
) -> RunConfig:
    """`config_io.load_config` with the model's folders read: the one way in for every command.

    Raises:
        ConfigError: one for all: values that cannot be read, folders that cannot, and values that disagree with them.
    """
    config, read = read_run(path, overrides, preset)
    raise_problems(with_read_problems(resolve_model(config), read))
    return config


def read_run(
    path: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None
) -> tuple[RunConfig, list[Problem]]:
    """`config_io.read_config`; for a backbone of a published shape that model's plugins and learning rates lie beneath.

    Raises:
        ConfigError: a file or preset as a whole cannot be read.
    """
    config, read = read_config(path, overrides, preset)
    variant = published_variant(config.model)
    if variant is None:
        return config, read
    defaults: dict[str, Any] = {"model": {"hlora": dataclasses.asdict(load_config(preset=variant).model.hlora)}}
    if (lr := LEARNING_RATES.get((variant, config.training.stage))) is not None:
        defaults["optimizer"] = {"lr": lr}
    return read_config(path, overrides, preset, defaults=defaults)


def published_variant(model: ModelConfig) -> str | None:
    """The preset of the published model whose backbone has the same shape; None where no model is published for it."""
    content: Mapping[str, Any] = model.hf_config
    try:
        if model.backbone is not None and (Path(model.backbone) / "config.json").is_file():
            content = read_json(Path(model.backbone) / "config.json", CheckpointError)
        shape = read_backbone(content)
    except HealthGPTError:
        return None  # which resolving the model says
    return next((name for name in PUBLISHED if _is_same_model(load_config(preset=name).model.hf_config, shape)), None)


def with_read_problems(problems: Sequence[str], read: Sequence[Problem]) -> list[str]:
    """All messages; of the later ones only those that are not about an option whose value could not be read."""
    names = [_mention_of(problem.field) for problem in read if problem.field]
    later = [text for text in problems if not any(name.search(text) for name in names)]
    return [*(problem.message for problem in read), *later]


def _mention_of(field: str) -> re.Pattern[str]:
    """Finds the full dotted name in a message; a name without a dot is a word as well, and is one only before `=`."""
    after = r"(?!\w)" if "." in field else r"(?:=|\.\w)"
    return re.compile(rf"(?<![\w.]){re.escape(field)}{after}")


def resolve_model(config: RunConfig) -> list[str]:
    """Fill what the configuration leaves open from the folders that it names.

    Sets, where they are not: `model.hf_config`, `model.vision.hf_config`, `model.vq.num_codes` and `num_indices`,
    `model.vocabulary.text_size`, `model.template`. Doing it again changes nothing.

    Returns:
        Problems, each naming field, value and remedy.
    """
    model = config.model
    problems = [*_resolve_backbone(model), *_resolve_tower(model.vision), *_resolve_vqgan(model.vq)]
    return [*problems, *_resolve_text(config)]


def absent_folders(model: ModelConfig) -> list[str]:
    """``model.backbone=…`` and so on, for each named folder that is not here."""
    named = {
        "model.backbone": model.backbone,
        "model.tokenizer": model.tokenizer,
        "model.vision.tower": model.vision.tower,
        "model.vq.path": model.vq.path,
    }
    return [f"{name}={value}" for name, value in named.items() if value is not None and not Path(value).is_dir()]


def _is_absent(name: str, folder: str, *, is_needed: bool) -> Iterator[str]:
    if is_needed:
        yield f"{name}={folder} is not a folder"


def _line(name: str, error: object) -> str:
    return f"{name}: {' '.join(str(error).split())}"  # YAML's own messages have several lines


def _disagreement(name: str, said: Any, file: Path, key: str, found: Any) -> str:
    return f"{name}={shown(said)}, but {file} gives {key}={shown(found)}; leave it out, or name the folder that fits"


def _resolve_backbone(model: ModelConfig) -> Iterator[str]:
    if model.backbone is None:
        return
    folder = Path(model.backbone)
    if not folder.is_dir():
        yield from _is_absent("model.backbone", model.backbone, is_needed=not model.hf_config)
        return
    file = folder / "config.json"
    try:
        found = read_json(file, CheckpointError)
        shape = read_backbone(found)
    except HealthGPTError as error:
        yield _line("model.backbone", error if str(file) in str(error) else f"{file}: {error}")
        return
    yield from _backbone_disagreements(model.hf_config, found, shape, file)
    model.hf_config = found


def _backbone_disagreements(
    said: Mapping[str, Any], found: Mapping[str, Any], shape: BackboneShape, file: Path
) -> Iterator[str]:
    """Of each value by itself: whether the model would be another one with it."""
    for key, value in said.items():
        is_other = key not in _ROPE and not _is_same_model({**found, key: value}, shape)
        if is_other or (key == "vocab_size" and value != found.get(key)):
            yield _disagreement(f"model.hf_config.{key}", value, file, key, found.get(key))
    rope = {key: said[key] for key in _ROPE if key in said}
    without = {key: value for key, value in found.items() if key not in _ROPE}
    if rope and not _is_same_model({**without, "rope_theta": shape.rope_theta, **rope}, shape):
        text = ", ".join(f"{key}={value!r}" for key, value in rope.items())
        yield f"model.hf_config: {text}, but {file} gives rope_theta={shape.rope_theta:g}; leave it out"


def _is_same_model(config: Mapping[str, Any], shape: BackboneShape) -> bool:
    """Apart from the tie flag, which is the checkpoint's business alone."""
    try:
        other = dataclasses.replace(read_backbone(config), tied=shape.tied)
    except ConfigError:
        return False
    pairs = zip(dataclasses.astuple(other), dataclasses.astuple(shape), strict=True)
    return all(_equal(a, b) for a, b in pairs)


def _equal(a: Any, b: Any) -> bool:
    """Floats may have been through fp32 on their way into a file."""
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else bool(a == b)


def _resolve_tower(vision: VisionConfig) -> Iterator[str]:
    if vision.tower is None:
        return
    folder = Path(vision.tower)
    if not folder.is_dir():
        yield from _is_absent("model.vision.tower", vision.tower, is_needed=not vision.hf_config)
        return
    file = folder / "config.json"
    try:
        content = read_json(file, CheckpointError)
    except CheckpointError as error:
        yield _line("model.vision.tower", error)
        return
    nested = content.get("vision_config", content)
    kind = nested.get("model_type", "clip_vision_model") if isinstance(nested, dict) else type(nested).__name__
    if kind not in ("clip_vision_model", "clip"):
        yield f"model.vision.tower: {file} describes a {kind!r}; give the folder of a CLIP vision model"
        return
    found = {key: nested.get(key, default) for key, default in CLIP_DEFAULTS.items()}
    for key, value in vision.hf_config.items():
        if key in found and not _equal(value, found[key]):
            yield _disagreement(f"model.vision.hf_config.{key}", value, file, key, found[key])
    vision.hf_config = {**vision.hf_config, **found}


def _resolve_vqgan(vq: VQConfig) -> Iterator[str]:
    found = {"num_codes": DEFAULT_CODES, "num_indices": DEFAULT_INDICES}
    if vq.path is not None and not Path(vq.path).is_dir():
        yield from _is_absent("model.vq.path", vq.path, is_needed=vq.num_codes is None or vq.num_indices is None)
        return
    if vq.path is not None:
        from megatron_hgpt.vision.vqgan import VQGANConfig

        file = Path(vq.path) / "model.yaml"
        try:
            config = VQGANConfig.load(file)
        except HealthGPTError as error:
            yield _line("model.vq.path", error)
            return
        found = {"num_codes": config.n_embed, "num_indices": config.ddconfig.latent_resolution**2}
        names = {"num_codes": "n_embed", "num_indices": "indices per image"}
        for name, value in found.items():
            said = getattr(vq, name)
            if said is not None and said != value:
                yield _disagreement(f"model.vq.{name}", said, file, names[name], value)
    for name, value in found.items():
        if getattr(vq, name) is None:
            setattr(vq, name, value)


def _resolve_text(config: RunConfig) -> Iterator[str]:
    model = config.model
    name = "model.backbone" if model.tokenizer is None else "model.tokenizer"
    folder = model.tokenizer or model.backbone
    if folder is not None and not Path(folder).is_dir():
        yield from _is_absent(name, folder, is_needed=model.vocabulary.text_size is None)
    elif folder is not None:
        try:
            description, bos_token = read_tokenizer(folder)
        except HealthGPTError as error:
            yield _line(name, error)
        else:
            entries = vocabulary_of(description)
            if bos_token is not None and bos_token not in entries and has_dummy_space(description):
                yield f"{name}: bos_token={bos_token!r} in {folder} is no entry of its tokenizer.json; correct it there"
            if not entries or not 0 <= min(entries.values()) <= max(entries.values()) < MOST_IDS:
                yield f"{name}: the tokenizer in {folder} has no entries, or ids outside 0 to {MOST_IDS - 1}"
                return
            yield from _resolve_text_size(model, folder, 1 + max(entries.values()))
            yield from _resolve_template(config, folder, entries)
    if model.template is None:
        model.template = "plain" if config.training.stage == "stage1_comprehension" else model.chat_template


def _resolve_text_size(model: ModelConfig, folder: str, size: int) -> Iterator[str]:
    said = model.vocabulary.text_size
    if said is None:
        model.vocabulary.text_size = size
    elif said < size:
        yield (
            f"model.vocabulary.text_size={said}, but the tokenizer in {folder} has {size} entries: text and image "
            "tokens would share ids; leave it out, or set it to at least that"
        )
    rows = model.hf_config.get("vocab_size")
    if model.backbone is not None and Path(model.backbone).is_dir() and isinstance(rows, int) and rows < (said or size):
        yield (
            f"model.vocabulary.text_size={said or size} exceeds vocab_size={rows} of {Path(model.backbone)}: a text id "
            f"would have no row; {'the tokenizer belongs to another model' if rows < size else 'lower it'}"
        )


def _resolve_template(config: RunConfig, folder: str, entries: Mapping[str, int]) -> Iterator[str]:
    """`model.template`, from the tokenizer's control tokens, or whether the given ones fit them."""
    model = config.model
    try:
        family = read_backbone(model.hf_config).family
    except ConfigError:
        family = ""
    chat = chat_template_of(entries, family, _text_of(folder))
    for field in ("template", "chat_template"):
        given = getattr(model, field)
        if given not in (None, "plain") and TEMPLATES[given].end not in entries:
            belongs = f"; its own is {chat}" if chat else ""
            yield (
                f"model.{field}={given} ends with {TEMPLATES[given].end}, which the tokenizer in {folder} lacks"
                f"{belongs}"
            )
    if model.template is None and config.training.stage != "stage1_comprehension":
        model.template = model.chat_template or chat
        if model.template is None:
            yield (
                f"model.template cannot be told from the tokenizer in {folder}; set it to one of {', '.join(TEMPLATES)}"
            )


def _text_of(folder: str) -> str:
    """The tokenizer's own configuration and chat template, which name the model that they were made for."""
    paths = [Path(folder) / name for name in ("tokenizer_config.json", "chat_template.jinja")]
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
