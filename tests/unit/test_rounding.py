from __future__ import annotations

import pytest

from megatron_hgpt.rounding import ceil_div, plural, round_up


@pytest.mark.parametrize(("count", "pieces"), [(0, 0), (1, 1), (7, 1), (8, 2), (14, 2)])
def test_division_rounds_up(count: int, pieces: int) -> None:
    assert ceil_div(count, 7) == pieces
    assert round_up(count, 7) == 7 * pieces


def test_integers_too_large_for_floats_stay_exact() -> None:
    assert ceil_div(2**60 + 1, 2) == 2**59 + 1


def test_whole_numbers_in_words() -> None:
    assert [plural(1, "step"), plural(1200, "step"), plural(2, "process")] == ["1 step", "1,200 steps", "2 processes"]
