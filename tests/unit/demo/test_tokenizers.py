"""The tiny tokenizer: Phi-3's layout, deterministic, loadable without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_hgpt.demo.tokenizers import CHAT_TOKENS, make_tiny_tokenizer
from megatron_hgpt.errors import DataError


def test_layout_and_round_trip(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_tokenizer(tmp_path / "tokenizer"), local_files_only=True)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", *CHAT_TOKENS)]
    assert ids == [2, *range(len(tokenizer) - len(CHAT_TOKENS), len(tokenizer))]
    for token in ("<s>", "</s>", *CHAT_TOKENS):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    text = "Is this CT? Ångström 水\nyes"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("imaging", add_special_tokens=False)) < len("imaging")  # merges are in use


def test_is_deterministic_and_respects_the_size(tmp_path: Path) -> None:
    texts = ["the head and the brain", "the brain in the head"] * 3
    first = make_tiny_tokenizer(tmp_path / "a", texts, 300) / "tokenizer.json"
    second = make_tiny_tokenizer(tmp_path / "b", texts, 300) / "tokenizer.json"
    assert first.read_bytes() == second.read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)) <= 300


def test_too_small_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size 264 is too small"):
        make_tiny_tokenizer(tmp_path, ["abc"], 264)
