"""HealthGPT end to end on real small medical images: data, models, three training stages, evaluation, one report.

    python tools/run_demo.py                        a tiny Phi-3-shaped model, two processes (TP 2 + sequence parallel)
    python tools/run_demo.py --backbone smollm2     SmolLM2-135M, three processes; long on a CPU

Everything goes to runs/demo (or --output). A second run continues where the first stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Command line."""
    from megatron_hgpt.demo.run import add_arguments, run
    from megatron_hgpt.errors import HealthGPTError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return run(parser.parse_intermixed_args())
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
