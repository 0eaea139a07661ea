"""A YAML of three paths, data and stage trains a model of each family, made with transformers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.demo.checkpoints import write_tiny_clip, write_tiny_llama, write_tiny_phi3, write_tiny_qwen2
from megatron_hgpt.demo.tokenizers import DEFAULT_TEXTS, make_tiny_tokenizer
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.vqgan import VQGAN
from megatron_hgpt.vision.vqgan_training import train_vqgan

SHORT = ["training.num_steps=2", "training.global_batch_size=2", "logging.tensorboard=false", "data.num_workers=0"]


def _chatml_tokenizer(folder: Path, **extra: Any) -> Path:
    """Byte-level BPE with ChatML's control tokens, as Qwen2 and SmolLM2 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DEFAULT_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", **extra)
    fast.save_pretrained(folder)
    return folder


FAMILIES: dict[str, tuple[Callable[[Path], Path], Callable[..., None], str]] = {
    "phi3": (make_tiny_tokenizer, write_tiny_phi3, "phi3_instruct"),
    "llama": (
        lambda folder: _chatml_tokenizer(folder, chat_template="You are an assistant named SmolLM"),
        write_tiny_llama,
        "smollm2",
    ),
    "qwen2": (_chatml_tokenizer, write_tiny_qwen2, "qwen_2"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tower, VQGAN and four records with a picture each."""
    root = tmp_path_factory.mktemp("shared")
    write_tiny_clip(root / "clip", num_layers=2)
    pictures = [Image.fromarray(np.full((24, 16, 3), 40 * i, dtype=np.uint8)) for i in range(1, 5)]
    train_vqgan(
        [picture.resize((16, 16)) for picture in pictures], root / "vqgan", resolution=16, num_codes=4, num_steps=2
    )
    records = []
    for i, picture in enumerate(pictures):
        picture.save(root / f"{i}.png")
        answer = {"from": "gpt", "value": "" if i % 2 else "yes"}
        turns = [
            {"from": "human", "value": "<image>\nReconstruct the image." if i % 2 else "<image>\nIs it CT?"},
            answer,
        ]
        target = {"target_image": f"{i}.png"} if i % 2 else {}
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns, **target})
    (root / "train.json").write_text(json.dumps(records))
    return root


def _write_run(folder: Path, shared: Path, family: str, stage: str) -> Path:
    """Language model and tokenizer in `folder`/lm, and the YAML: three paths, data and stage."""
    make_tokenizer, write_backbone, _ = FAMILIES[family]
    make_tokenizer(folder / "lm")
    size = TextTokenizer.load(folder / "lm").vocab_size
    write_backbone(folder / "lm", text_vocab_size=size + 3, num_layers=2)
    values = {
        "model": {
            "backbone": str(folder / "lm"),
            "vision": {"tower": str(shared / "clip")},
            "vq": {"path": str(shared / "vqgan")},
        },
        "data": {"train": [str(folder / "data")]},
        "training": {"stage": stage},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def _preprocess(run: Path, shared: Path) -> dict[str, Any]:
    config = load_resolved(run)
    return preprocess(
        [Input(path=shared / "train.json")],
        run.parent / "data",
        tokenizer=TextTokenizer.load(str(config.model.backbone)),
        vocabulary=Vocabulary.from_config(config.model),
        options=PreprocessOptions(
            template=template_of(config.model),
            num_indices=config.model.vq.indices,
            num_image_tokens=config.model.vision.num_image_tokens,
            max_image_side=config.data.max_image_side,
        ),
        vqgan=VQGAN.load(shared / "vqgan"),
    )


def _train(run: Path) -> None:
    from megatron_hgpt.run_stage import main

    os.chdir(run.parent)  # output_dir is left at its default
    main(load_resolved(run, SHORT))


def _generator_of_the_run(folder: Path) -> tuple[str, int, int]:
    from megatron_hgpt.inference.loading import load_run

    generator = load_run(folder, overrides=["data.max_image_side=512"]).generator
    return generator.template, generator.num_indices, generator.max_image_side


@pytest.mark.parametrize("family", FAMILIES)
def test_three_paths_data_and_stage_train(family: str, shared: Path, tmp_path: Path) -> None:
    run = _write_run(tmp_path, shared, family, "stage3_joint")
    manifest = _preprocess(run, shared)
    assert manifest["template"]["name"] == FAMILIES[family][2]
    assert manifest["counts"]["per_task"] == {"comprehension": 2, "generation": 2}
    run_ranks(_train, 1, run)
    records = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in records)
    (resolved,) = (tmp_path / "runs" / "run" / "checkpoints").glob("*/resolved_config.yaml")
    assert load_resolved(resolved).model.template == FAMILIES[family][2]


def test_stage_1_comprehension_trains_on_plain_captions_and_answers_so(shared: Path, tmp_path: Path) -> None:
    run = _write_run(tmp_path, shared, "phi3", "stage1_comprehension")
    assert _preprocess(run, shared)["template"]["name"] == "plain"
    run_ranks(_train, 1, run)
    assert run_ranks(_generator_of_the_run, 1, tmp_path / "runs" / "run") == [("plain", 4, 512)]
    # The same dataset does not fit a stage that has the chat template.
    run.write_text(run.read_text().replace("stage1_comprehension", "stage3_comprehension"))
    with pytest.raises(AssertionError, match="template of the dataset is 'plain', the run's is 'phi3_instruct'; write"):
        run_ranks(_train, 1, run)
