"""What one rank meets, as its peers report it."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_hgpt.checkpoint import agreement
from megatron_hgpt.errors import CheckpointError


@pytest.mark.parametrize(("is_crash", "kind"), [(True, RuntimeError), (False, CheckpointError)])
def test_the_peers_of_a_crash_crash_and_those_of_an_error_have_it(is_crash: bool, kind: type[Exception]) -> None:
    others = [(None, False), ("out of memory", is_crash)]
    with (
        mock.patch.object(agreement, "gathered", lambda _: others),
        pytest.raises(RuntimeError, match=r"out of memory \(rank 1 of 2\)") as error,
    ):
        agreement.on_every_rank(lambda: 1)
    assert type(error.value) is kind
