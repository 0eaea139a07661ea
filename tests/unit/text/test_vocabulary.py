from __future__ import annotations

import pytest

from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.text.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("preset", "start", "first", "last", "end", "newline", "size", "padded"),
    [
        # The HealthGPT release's added tokens, in its order.
        ("healthgpt_m3", 32011, 32012, 40203, 40204, 40205, 40206, 40960),
        ("healthgpt_l14", 100352, 100353, 108544, 108545, 108546, 108547, 109568),
    ],
)
def test_ids_are_the_release_s(
    preset: str, start: int, first: int, last: int, end: int, newline: int, size: int, padded: int
) -> None:
    vocabulary = Vocabulary.from_config(load_config(preset=preset).model)
    assert vocabulary.start_id == start
    assert vocabulary.first_code_id == first
    assert vocabulary.encode_indices([0, 8191]) == [start, first, last, end]
    assert (vocabulary.end_id, vocabulary.pixel_newline_id) == (end, newline)
    assert (vocabulary.size, vocabulary.padded_size) == (size, padded)


def test_without_vq_tokens_the_vocabulary_is_the_text() -> None:
    vocabulary = Vocabulary.from_config(load_config(preset="healthgpt_xl32").model)
    assert vocabulary.size == vocabulary.text_size == 151665
    assert vocabulary.padded_size == 152576  # 149 * 1024
    assert vocabulary.decode_ids([0, 151664, 151665, 151666]) == []
    with pytest.raises(ConfigError, match="VQ index 0 is outside the codebook of 0"):
        vocabulary.encode_indices([0])


def test_indices_come_back_and_other_ids_are_dropped() -> None:
    vocabulary = Vocabulary(text_size=10, num_codes=4, pad_to_multiple=8)
    assert vocabulary.size == 17
    assert vocabulary.padded_size == 24
    ids = vocabulary.encode_indices([3, 0, 2])
    assert ids == [10, 14, 11, 13, 15]
    assert vocabulary.decode_ids([9, *ids, vocabulary.pixel_newline_id]) == [3, 0, 2]


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_codebook_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=f"VQ index {index} is outside"):
        Vocabulary(text_size=10, num_codes=4).encode_indices([0, index])


def test_a_size_that_is_a_multiple_already_is_not_padded() -> None:
    assert Vocabulary(text_size=9, num_codes=4, pad_to_multiple=16).padded_size == 16
