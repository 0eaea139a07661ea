#!/usr/bin/env python3
"""Write one self-contained HTML report from the folders of finished stages and evaluations.

    python tools/make_report.py --out report.html --run runs/demo/stage1 --run runs/demo/stage2 \\
        --evaluation train=runs/demo/evaluation/train --evaluation held-out=runs/demo/evaluation/held_out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.report.page import write_report


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the report, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="output folder of a stage; repeat in order"
    )
    parser.add_argument(
        "--evaluation", type=_pair, action="append", default=[], metavar="SPLIT=FOLDER", help="evaluated split; repeat"
    )
    parser.add_argument("--title", default="HealthGPT training report")
    parser.add_argument(
        "--note", type=_pair, action="append", default=[], metavar="NAME=TEXT", help="fact to show; repeat"
    )
    args = parser.parse_args(arguments)
    try:
        write_report(
            args.out,
            runs=args.run,
            evaluations={name: Path(folder) for name, folder in args.evaluation},
            title=args.title,
            notes=dict(args.note),
        )
    except HealthGPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
