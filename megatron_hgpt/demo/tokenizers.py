"""A small tokenizer of Phi-3's kind, trained on the spot: tests and the demo need no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hgpt.errors import DataError

CHAT_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_CONTROL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

DEFAULT_TEXTS = (
    "What imaging modality is shown in this picture?",
    "Is this slice taken in the axial plane? Answer yes or no.",
    "The image shows a computed tomography of the abdomen; no abnormality is described.",
    "Reconstruct the image. Convert this CT slice to MRI. Increase the resolution of this image.",
    "You are a helpful AI assistant. You are a medical assistant who answers questions about pictures.",
)


def make_tiny_tokenizer(folder: Path, texts: Sequence[str] | None = None, vocab_size: int = 512) -> Path:
    """Train a byte-fallback BPE on `texts` and write it as a Hugging Face folder that `AutoTokenizer` loads.

    Layout of the ids, like Phi-3's: `<unk>`, `<s>`, `</s>`, 256 bytes, pieces, then the chat tokens (special; as in
    Phi-3 they swallow the white space that follows them). The same texts give the same ids.

    Args:
        folder: created; gets tokenizer.json and tokenizer_config.json.
        texts: training sentences; None takes a few built-in ones.
        vocab_size: entries in all, at most: a small corpus may give fewer.

    Raises:
        DataError: `vocab_size` leaves no room for the bytes, the characters of the texts and the chat tokens.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    lines = [line for text in (DEFAULT_TEXTS if texts is None else texts) for line in text.splitlines()]
    fixed = (*_CONTROL, *_BYTES)
    alphabet = {character for line in lines for character in line.replace(" ", "▁")}
    needed = len(fixed) + len(alphabet) + len(CHAT_TOKENS)
    if vocab_size < needed:
        raise DataError(f"vocab_size {vocab_size} is too small: control, bytes and characters alone take {needed}")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # pieces do not span words, as sentencepiece's
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CHAT_TOKENS), special_tokens=list(fixed), show_progress=False, min_frequency=2
    )
    trained.train_from_iterator(lines, trainer)
    vocabulary = trained.get_vocab(with_added_tokens=True)
    pieces = sorted((piece for piece in vocabulary if piece not in fixed), key=lambda piece: vocabulary[piece])
    tokenizer = LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate((*fixed, *pieces))},
        merges=_merges(trained),
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True, normalized=False) for token in CHAT_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def _merges(tokenizer: object) -> list[tuple[str, str]]:
    """The merge list of a trained BPE, most important first."""
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]  # type: ignore[attr-defined]
