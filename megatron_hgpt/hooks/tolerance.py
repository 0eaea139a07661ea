"""Figures that cannot be written cost a warning, and not the run: a disk may fill up while training goes on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_hgpt.errors import reason_of

logger = logging.getLogger(__name__)


class Tolerance:
    """Says once which file cannot be written, and once that it can be again."""

    def __init__(self) -> None:
        self._failing: set[Path] = set()

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """What is written to `path` in this block may fail with an OSError: it ends the block, with a warning."""
        try:
            yield
        except OSError as error:
            if path not in self._failing:
                self._failing.add(path)
                logger.warning("%s cannot be written (%s): training goes on without it", path, reason_of(error))
        else:
            if path in self._failing:
                self._failing.discard(path)
                logger.warning("%s can be written again", path)
