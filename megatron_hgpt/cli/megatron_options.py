"""Megatron-LM's options, as people type them from habit, in the words of this project."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_hgpt.config_reference import sections

_OTHER_NAMES = {
    "train_iters": "training.num_steps",
    "seq_length": "model.max_seq_length",
    "save": "checkpoint.directory",
    "load": "checkpoint.init_from",
    "save_interval": "checkpoint.save_interval_steps",
    "eval_interval": "training.validation_interval_steps",
    "log_interval": "logging.interval_steps",
}
"""Megatron-LM's name -> ours, where the last part differs."""


def as_overrides(unknown: Sequence[str], words: Sequence[str]) -> list[str]:
    """What to write for unknown options: ``--lr 1e-4`` is ``optimizer.lr=1e-4``; options without a key are left out.

    Args:
        unknown: the options, with or without ``=value``.
        words: the whole command line, which has the values.
    """
    options = [option for section in sections() for option in section.options]
    kinds = {option.name: option.kind for option in options}
    found = []
    for word in unknown:
        flag, separator, value = word.partition("=")
        leaf = flag.lstrip("-").replace("-", "_")
        names = [name for name in kinds if name.rpartition(".")[2] == leaf]
        name = _OTHER_NAMES.get(leaf) or (names[0] if len(names) == 1 else None)
        if name is None:
            continue
        if not separator:
            value = _following(word, words) or ("true" if kinds[name] == kinds["parallel.sequence_parallel"] else "…")
        found.append(shlex.quote(f"{name}=[{value}]" if kinds[name].startswith("list") else f"{name}={value}"))
    return found


def _following(word: str, words: Sequence[str]) -> str | None:
    """The value after an option; None at the end, and where another option or an override follows."""
    after = list(words[words.index(word) + 1 :][:1]) if word in words else []
    return after[0] if after and not after[0].startswith("--") and "=" not in after[0] else None
