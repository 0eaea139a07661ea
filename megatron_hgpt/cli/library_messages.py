"""Known messages of libraries that tell a user nothing to act on, each silenced where it arises, with the reason.

Only these: a warning that is not listed here is shown.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # megatron.core at import. Apex's fused norm is optional; torch's is what the parity tests are about, and PyPI's
    # `apex` is an unrelated package that a user who follows the hint would install.
    (r"Apex is not installed\. Falling back to Torch Norm", UserWarning, ""),
    # megatron.core warns of its own default: no run of this project sets a CUDA graph scope.
    (r"full scope is deprecated\. Use empty cuda_graph_scope", UserWarning, ""),
    # torch renamed collectives that megatron.core calls; the versions in constraints.txt are tested together.
    (r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning, ""),
    # The same in torch.distributed.checkpoint, called by megatron.core's sharded checkpoints.
    (r"`(load|save)_state_dict` is deprecated and will be removed", FutureWarning, ""),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning, ""),
    # megatron.core's distributed optimizer looks at `.grad` of the views that it makes, and means none to be there.
    # Anywhere else this warning is of a bug.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning, r"megatron\.core\.optimizer"),
)
"""Start of the message (a regular expression), category, module that warns (empty: any)."""

_LOGGERS: tuple[tuple[str, int], ...] = (
    # megatron.core announces at every start, as warnings, that its machinery for rerunning steps is off.
    ("megatron.core.rerun_state_machine", logging.ERROR),
)
"""Logger, and the least severe record of it that is shown."""


def silence_known() -> None:
    """Silence them in this process; called by the command line before a library is imported."""
    for message, category, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for name, level in _LOGGERS:
        logging.getLogger(name).setLevel(level)
