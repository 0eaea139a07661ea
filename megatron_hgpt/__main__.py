"""``python -m megatron_hgpt <command>``: the same as ``hgpt <command>``."""

import sys

# Nothing here spawns processes, but a library may, and each imports this file again: it must not start a command.
if __name__ == "__main__":
    from megatron_hgpt.cli import main

    sys.exit(main())
