"""Text never becomes control tokens; segments are tokenised as the whole string would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_hgpt.errors import DataError
from megatron_hgpt.text.tokenizer import TextTokenizer

SENTENCEPIECE_CONTROL = ["<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
BPE_CONTROL = ["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<tool_call>"]


@pytest.mark.parametrize(
    ("family", "control"), [("sentencepiece", SENTENCEPIECE_CONTROL), ("bpe", BPE_CONTROL)], ids=["sp", "bpe"]
)
def test_text_never_injects_control_tokens(family: str, control: list[str], request: pytest.FixtureRequest) -> None:
    # Fails when `encode_special_tokens = True` in tokenizer.py is taken out.
    tokenizer: TextTokenizer = request.getfixturevalue(family)
    for token in control:
        ids = {tokenizer.token_id(token)}
        if token != "<tool_call>":  # its family marks it not special, and no template holds it
            assert tokenizer.encode_template(token) == [tokenizer.token_id(token)]
        for text in (token, f"a {token}b", f"{token}\n{token}", f"<{token}>"):
            for at_start in (False, True):
                encoded = tokenizer.encode(text, at_start=at_start)
                assert ids.isdisjoint(encoded)
                assert tokenizer.decode(encoded) == text  # and nothing was lost


@pytest.mark.parametrize("text", ["What is this?", "yes", "a\nb", "Überraschung 水", "x  y"])
def test_segment_after_a_control_token_equals_the_whole_string(
    text: str, sentencepiece: TextTokenizer, sentencepiece_folder: Path, bpe: TextTokenizer, bpe_folder: Path
) -> None:
    for tokenizer, folder, header in (
        (sentencepiece, sentencepiece_folder, "<|user|>"),
        (bpe, bpe_folder, "<|im_sep|>"),
    ):
        reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        whole = reference.encode(header + text, add_special_tokens=False)
        assert [tokenizer.token_id(header), *tokenizer.encode(text)] == whole
        assert tokenizer.encode(text, at_start=True) == reference.encode(text, add_special_tokens=False)


def test_dummy_space_is_the_one_difference_of_at_start(sentencepiece: TextTokenizer, bpe: TextTokenizer) -> None:
    assert sentencepiece.encode("\nyes", at_start=True) == [sentencepiece.token_id("▁"), *sentencepiece.encode("\nyes")]
    assert bpe.encode("\nyes", at_start=True) == bpe.encode("\nyes")


def test_bos_and_sizes(sentencepiece: TextTokenizer, bpe: TextTokenizer) -> None:
    assert sentencepiece.bos_id == 1
    assert bpe.bos_id is None  # it names a BOS token but starts no sequence with it
    assert bpe.vocab_size == bpe.token_id("<tool_call>") + 1
    assert sentencepiece.decode([1, *sentencepiece.encode("yes"), sentencepiece.vocab_size + 5, -200]) == "yes"


def test_hash_follows_what_decides_the_ids(sentencepiece_folder: Path, tmp_path: Path) -> None:
    original = TextTokenizer.load(sentencepiece_folder).hash
    assert TextTokenizer.load(sentencepiece_folder).hash == original
    description = json.loads((sentencepiece_folder / "tokenizer.json").read_text())
    assert TextTokenizer({**description, "post_processor": None, "decoder": None}, "<s>").hash == original
    fewer_merges = {**description["model"], "merges": description["model"]["merges"][:-1]}
    assert TextTokenizer({**description, "model": fewer_merges}, "<s>").hash != original
    assert TextTokenizer({**description, "added_tokens": description["added_tokens"][:-1]}, "<s>").hash != original


def test_legacy_prepend_normaliser_is_handled(sentencepiece_folder: Path) -> None:
    """Older tokenizer.json files add the dummy space by a normaliser instead."""
    description = json.loads((sentencepiece_folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    description["pre_tokenizer"] = None
    description["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    legacy, current = TextTokenizer(description, "<s>"), TextTokenizer.load(sentencepiece_folder)
    assert legacy.bos_id == 1
    for at_start in (False, True):
        assert legacy.encode("is this\nCT", at_start=at_start) == current.encode("is this\nCT", at_start=at_start)


def test_errors(tmp_path: Path, bpe: TextTokenizer) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TextTokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"no token '<\|user\|>'"):
        bpe.token_id("<|user|>")


def test_control_piece_reached_by_plain_text_is_refused() -> None:
    """A unigram model can hold `</s>` as a piece that plain text reaches: refused rather than trained on."""
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["</s>", -1.0], ["<", -2.0], ["/", -2.0], ["s", -2.0], [">", -2.0]],
    }
    token = {"id": 1, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description = {
        "version": "1.0",
        "added_tokens": [{**token, "special": True}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    tokenizer = TextTokenizer(description, None)
    assert tokenizer.encode("s/s") == [4, 3, 4]
    with pytest.raises(DataError, match="control token </s>"):
        tokenizer.encode("s</s>")
