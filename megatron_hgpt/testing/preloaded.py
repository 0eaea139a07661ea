"""What every rank of a test imports, imported once by the server that ranks are forked from (saves 6 s a rank).

Nothing here may start a thread or touch a device: a forked process inherits neither.
"""
# ruff: noqa: E402

from megatron_hgpt import cpu_platform

cpu_platform.install_if_needed()

import transformers.models.clip.modeling_clip  # noqa: F401  (transformers imports it late)

import megatron_hgpt.checkpoint
import megatron_hgpt.data.loader
import megatron_hgpt.model.healthgpt
import megatron_hgpt.trainer  # noqa: F401
