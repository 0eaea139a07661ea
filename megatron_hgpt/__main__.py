"""``python -m megatron_hgpt <command>``: the same as ``hgpt <command>``."""

import sys

# Checkpoint writers are spawned processes that import this file again: they must not start a command.
if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main())
