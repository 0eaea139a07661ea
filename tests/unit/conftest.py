"""Tokenizers of both families, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hgpt.data.preprocess_run import preprocess_run
from megatron_hgpt.demo.tokenizers import DEFAULT_TEXTS, make_tiny_tokenizer
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE of GPT-2's kind with the chat tokens of Phi-4 and ChatML, and a tool token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DEFAULT_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.add_tokens(["<tool_call>"])
    folder = tmp_path_factory.mktemp("bpe")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(sentencepiece_folder)


@pytest.fixture(scope="session")
def bpe(bpe_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(bpe_folder)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(text_size=400, num_codes=16, pad_to_multiple=64)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of two steps on four samples of one picture (a.png), with its tokenizer and dataset beside it."""
    folder = tmp_path_factory.mktemp("tiny_run")
    Image.radial_gradient("L").save(folder / "a.png")
    turns = '[{"from": "human", "value": "<image>\\nCT?"}, {"from": "gpt", "value": "no"}]'
    records = [f'{{"id": "{name}", "image": "a.png", "conversations": {turns}}}' for name in "abcd"]
    (folder / "records.jsonl").write_text("\n".join(records))
    values = {
        "preset": "tiny",
        "output_dir": str(folder / "run"),
        "model": {"tokenizer": str(make_tiny_tokenizer(folder / "tokenizer"))},
        "data": {"train": [str(folder / "data")]},
        "training": {"stage": "stage1_comprehension", "num_steps": 2, "global_batch_size": 2, "precision": "fp32"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    preprocess_run(load_resolved(folder / "run.yaml"), [folder / "records.jsonl"], folder / "data")
    return folder / "run.yaml"
