"""The text tokenizer: a Hugging Face fast tokenizer that never turns text from data or users into control tokens.

A sentencepiece tokenizer (Phi-3's family) puts a dummy space in front of each string it is given. A conversation
is tokenised segment by segment, and a segment that follows a control token must not get that space, as in the whole
string. The text right after an image does get it: the HealthGPT release (as LLaVA) splits the prompt at `<image>` and
tokenises the pieces as strings of their own (llava/mm_utils.py). BPE tokenizers (Phi-4, Qwen, SmolLM) have none.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError
from megatron_hgpt.files import read_json


class TextTokenizer:
    """Text to ids and back, without `<image>` and without the VQ tokens (those are arithmetic, `text.vocabulary`).

    Attributes:
        bos_id: id that starts every sequence; None where the family uses none (byte-level BPE).
        vocab_size: highest id + 1, added tokens included.
        hash: sha256 over everything that decides which ids a text gets.
    """

    def __init__(self, description: dict[str, Any], bos_token: str | None) -> None:
        """`description` is the content of tokenizer.json (tokenizers' serialisation)."""
        from tokenizers import Tokenizer

        description = {**description, "truncation": None, "padding": None}
        self._decoder = Tokenizer.from_str(json.dumps(description))
        self._template = Tokenizer.from_str(json.dumps(_without_dummy_space(description)))
        plain = _all_added_tokens_special(description)
        self._text = Tokenizer.from_str(json.dumps(_without_dummy_space(plain)))
        self._text_at_start = Tokenizer.from_str(json.dumps(plain))
        for tokenizer in (self._text, self._text_at_start):
            tokenizer.encode_special_tokens = True  # special strings are split into ordinary pieces
        self.vocab_size = 1 + max(self._decoder.get_vocab(with_added_tokens=True).values())
        self._control_ids = {token["id"] for token in plain["added_tokens"] if token["special"]}
        self.bos_id = self.token_id(bos_token) if bos_token is not None and has_dummy_space(description) else None
        deciding = {key: description.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        content = json.dumps([deciding, self.bos_id], sort_keys=True, ensure_ascii=False)
        self.hash = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Read a tokenizer folder; see `read_tokenizer` for which of its files count.

        Raises:
            DataError: no folder, no tokenizer in it, or one without a fast version.
        """
        return cls(*read_tokenizer(folder))

    def encode(self, text: str, *, at_start: bool = False) -> list[int]:
        """Ids of untrusted text; strings like `<|end|>` in it become ordinary pieces, never control tokens.

        Args:
            text: what a user or a dataset wrote.
            at_start: give the dummy space of a string of its own (the text after an image).

        Raises:
            DataError: the tokenizer gives a control token for plain text all the same (none known does).
        """
        ids: list[int] = (self._text_at_start if at_start else self._text).encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(ids):
            found = self._decoder.id_to_token(next(i for i in ids if i in self._control_ids))
            raise DataError(f"the tokenizer turns plain text into the control token {found}; text: {text[:80]!r}")
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a piece of a chat template: special strings become their ids; no dummy space is added."""
        ids: list[int] = self._template.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens and ids outside the text vocabulary are left out."""
        return str(self._decoder.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True))

    def token_id(self, token: str) -> int:
        """Id of one vocabulary entry.

        Raises:
            DataError: there is no such entry.
        """
        found = self._decoder.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}; the template belongs to another tokenizer")
        return int(found)


def read_tokenizer(folder: str | Path) -> tuple[dict[str, Any], str | None]:
    """A tokenizer as tokenizers' serialisation, from its own tokenizer.json alone, and its BOS token.

    transformers' `AutoTokenizer` takes the class from config.json or tokenizer_config.json beside it, and many of
    those classes replace the pre-tokenizer by their own: Phi-4's ids of "3.5 ml/s" then depend on the neighbours.
    Only a folder without tokenizer.json (sentencepiece's tokenizer.model, vocab.json with merges.txt) is converted.

    Raises:
        DataError: no folder, no tokenizer in it, one that cannot be read, or one without a fast version.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"tokenizer folder {folder} does not exist; give the folder that holds tokenizer.json")
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _convert(folder)
    try:
        # Through the library: it fills in the fields that an older version did not write.
        serialised = Tokenizer.from_str(file.read_text(encoding="utf-8")).to_str()
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file}: no tokenizer can be loaded ({error})") from error
    return json.loads(serialised), _read_bos_token(folder)


_NEIGHBOURS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SOURCES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt")
"""What `_convert` shows to transformers: the tokenizer's own files, and no model's config.json."""


def _convert(folder: Path) -> tuple[dict[str, Any], str | None]:
    from transformers import AutoTokenizer

    sources = [folder / name for name in _SOURCES if (folder / name).is_file()]
    if not sources:
        raise DataError(f"{folder}: no tokenizer can be loaded (it holds neither tokenizer.json nor {_SOURCES[0]})")
    with tempfile.TemporaryDirectory() as alone:
        for path in (*sources, *(folder / name for name in _NEIGHBOURS)):
            if path.is_file():
                (Path(alone) / path.name).symlink_to(path.absolute())
        if not (Path(alone) / "tokenizer_config.json").is_file():
            kind = "LlamaTokenizer" if sources[0].suffix == ".model" else "GPT2Tokenizer"
            (Path(alone) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise DataError(f"{folder}: no tokenizer can be loaded ({' '.join(str(error).split())})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{folder}: {type(tokenizer).__name__} has no fast version; save one as tokenizer.json")
    return json.loads(backend.to_str()), tokenizer.bos_token


def _read_bos_token(folder: Path) -> str | None:
    """As tokenizer_config.json, else special_tokens_map.json, names it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        token = read_json(path).get("bos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def vocabulary_of(description: dict[str, Any]) -> dict[str, int]:
    """Every entry and its id, added tokens included; `description` as `read_tokenizer` gives it."""
    pieces = description["model"]["vocab"]
    if isinstance(pieces, list):  # a unigram model: (piece, score) in the order of the ids
        pieces = {piece: index for index, (piece, _) in enumerate(pieces)}
    return {**pieces, **{token["content"]: token["id"] for token in description["added_tokens"]}}


def has_dummy_space(description: dict[str, Any]) -> bool:
    """Whether it is of sentencepiece's family: a space in front of each string, and BOS before a sequence."""
    return _without_dummy_space(description) != description


def _without_dummy_space(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, never adding a space in front."""
    result = copy.copy(description)
    result["pre_tokenizer"] = _edit_parts(description.get("pre_tokenizer"), "pretokenizers")
    result["normalizer"] = _edit_parts(description.get("normalizer"), "normalizers")
    return result


def _edit_parts(part: dict[str, Any] | None, members: str) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        kept = [edited for member in part[members] if (edited := _edit_parts(member, members)) is not None]
        return {**part, members: kept}
    return {**part, "prepend_scheme": "never"} if part["type"] == "Metaspace" else part


def _all_added_tokens_special(description: dict[str, Any]) -> dict[str, Any]:
    """Marks bracketed added tokens special, since only special ones can be kept out of plain text.

    Phi-3 marks `</s>` and Qwen `<tool_call>` not special. Added words and white space (GPT-NeoX) stay as they are.
    """
    tokens = [
        {**token, "special": token["special"] or (token["content"][:1] in "<[" and token["content"][-1:] in ">]")}
        for token in description["added_tokens"]
    ]
    return {**description, "added_tokens": tokens}
