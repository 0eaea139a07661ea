"""Text never becomes control tokens; segments are tokenised as the whole string would be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_hgpt.demo.tokenizers import DEFAULT_TEXTS
from megatron_hgpt.errors import DataError
from megatron_hgpt.text.tokenizer import TextTokenizer, read_tokenizer, vocabulary_of

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


@pytest.mark.parametrize("family", ["sentencepiece_folder", "bpe_folder"])
def test_the_vocabulary_is_the_library_s(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    description, _ = read_tokenizer(folder)
    assert vocabulary_of(description) == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert 1 + max(vocabulary_of(description).values()) == TextTokenizer.load(folder).vocab_size
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": [{"content": "<s>", "id": 2}]}
    assert vocabulary_of(unigram) == {"<unk>": 0, "a": 1, "<s>": 2}


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


@pytest.fixture
def phi4_like(tmp_path: Path) -> Path:
    """A byte-level BPE whose pre-tokenizer (cl100k's) is not that of the class its tokenizer_config.json names."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["3.5 ml/s and 2.0 ml/s, ml/s"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_nothing_beside_tokenizer_json_changes_the_ids(phi4_like: Path) -> None:
    """Fails with transformers' AutoTokenizer: its classes put their own pre-tokenizer in place of the file's."""
    text = "3.5 ml/s"
    alone = TextTokenizer.load(phi4_like)
    expected = Tokenizer.from_file(str(phi4_like / "tokenizer.json")).encode(text).ids
    assert alone.encode(text) == expected
    seen_by_auto = set()
    for tokenizer_class in (None, "GPT2Tokenizer", "PreTrainedTokenizerFast"):
        settings = {"bos_token": "<|endoftext|>"} | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
        (phi4_like / "tokenizer_config.json").write_text(json.dumps(settings))
        for model_type in (None, "phi3", "llama", "qwen2", "gpt2"):
            (phi4_like / "config.json").unlink(missing_ok=True)
            if model_type:
                (phi4_like / "config.json").write_text(json.dumps({"model_type": model_type}))
                auto = AutoTokenizer.from_pretrained(phi4_like, local_files_only=True)
                seen_by_auto.add(tuple(auto.encode(text, add_special_tokens=False)))
            tokenizer = TextTokenizer.load(phi4_like)
            assert (tokenizer.encode(text), tokenizer.hash) == (expected, alone.hash)
    assert len(seen_by_auto) > 1  # or the neighbours would decide nothing


def test_the_bos_token_is_read_from_the_files_beside(sentencepiece_folder: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_folder / "tokenizer.json", tmp_path)
    assert TextTokenizer.load(tmp_path).bos_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}}))
    assert TextTokenizer.load(tmp_path).bos_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>"}))
    assert TextTokenizer.load(tmp_path).bos_id == 2


def test_a_folder_with_only_a_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join([*DEFAULT_TEXTS] * 5))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    text = "Is this slice CT?"
    expected = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    converted = TextTokenizer.load(tmp_path)
    assert converted.encode(text, at_start=True) == expected
    assert converted.bos_id == 1
    for model_type in ("phi3", "qwen2", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        beside = TextTokenizer.load(tmp_path)
        assert (beside.encode(text, at_start=True), beside.hash) == (expected, converted.hash)


def test_errors(tmp_path: Path, bpe: TextTokenizer) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TextTokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: no tokenizer can be loaded"):
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
