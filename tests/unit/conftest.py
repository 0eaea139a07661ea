"""Tokenizers of both families, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hgpt.demo.tokenizers import DEFAULT_TEXTS, make_tiny_tokenizer
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
