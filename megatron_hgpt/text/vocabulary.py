"""Where the VQ image tokens live in the vocabulary (spec section 4): arithmetic only, no string tokenisation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hgpt.config import ModelConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.rounding import round_up


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids: text, `<start_index>`, `<idx_0>` … `<idx_{num_codes-1}>`, `<end_index>`, `<pixel_newline>`, padding."""

    text_size: int
    num_codes: int
    pad_to_multiple: int = 1024

    @classmethod
    def from_config(cls, model: ModelConfig) -> Vocabulary:
        """The vocabulary that a resolved model configuration describes.

        Raises:
            ConfigError: a size is not known yet.
        """
        return cls(
            text_size=model.vocabulary.text_ids,
            num_codes=model.vq.codes,
            pad_to_multiple=model.vocabulary.pad_to_multiple,
        )

    @property
    def start_id(self) -> int:
        """Id of `<start_index>`."""
        return self.text_size

    @property
    def first_code_id(self) -> int:
        """Id of `<idx_0>`."""
        return self.text_size + 1

    @property
    def end_id(self) -> int:
        """Id of `<end_index>`."""
        return self.first_code_id + self.num_codes

    @property
    def pixel_newline_id(self) -> int:
        """Id of `<pixel_newline>`: reserved, never emitted."""
        return self.end_id + 1

    @property
    def size(self) -> int:
        """True vocabulary size, without padding; without VQ tokens (num_codes 0) the text ids alone."""
        return self.pixel_newline_id + 1 if self.num_codes else self.text_size

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and head matrices."""
        return round_up(self.size, self.pad_to_multiple)

    def encode_indices(self, indices: list[int]) -> list[int]:
        """VQ indices (raster order) to ids, with `<start_index>` in front and `<end_index>` behind.

        Raises:
            ConfigError: an index lies outside the codebook.
        """
        bad = [index for index in indices if not 0 <= index < self.num_codes]
        if bad:
            raise ConfigError(f"VQ index {bad[0]} is outside the codebook of {self.num_codes} entries")
        return [self.start_id, *(self.first_code_id + index for index in indices), self.end_id]

    def decode_ids(self, ids: list[int]) -> list[int]:
        """The VQ indices among `ids`, in order; other ids are dropped."""
        return [i - self.first_code_id for i in ids if self.first_code_id <= i < self.end_id]
