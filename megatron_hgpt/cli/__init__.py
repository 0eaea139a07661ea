"""The command line: one file per command, one frame around all of them; nothing else imports this package.

Must not import: testing.
"""

from megatron_hgpt.cli.frame import main

__all__ = ["main"]
