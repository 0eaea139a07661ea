"""``hgpt report``: one HTML page about finished stages and evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.cli import frame
from megatron_hgpt.errors import ConfigError

HELP = "write one self-contained HTML page from finished stages and evaluations"
EXAMPLES = r"""
hgpt report --out report.html --run runs/demo/stage1 --run runs/demo/stage2 \
    --evaluation held-out=runs/demo/evaluation/held-out-pictures --note Backbone=Phi-3
"""
NOTES = """"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes onto the page."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], metavar="FOLDER", help="output of a stage; repeat in order"
    )
    parser.add_argument(
        "--evaluation", type=frame.pair, action="append", default=[], metavar="SPLIT=FOLDER", help="split; repeat"
    )
    parser.add_argument("--title", default="HealthGPT training report", metavar="TEXT", help="of the page")
    parser.add_argument(
        "--note", type=frame.pair, action="append", default=[], metavar="NAME=TEXT", help="fact to show; repeat"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page and say where."""
    if not (arguments.run or arguments.evaluation):
        raise ConfigError("the report would be empty: name a stage with --run or a split with --evaluation")
    frame.require_writable(arguments.out, "--out")
    from megatron_hgpt.report.page import write_report

    write_report(
        arguments.out,
        runs=arguments.run,
        evaluations={name: Path(folder) for name, folder in arguments.evaluation},
        title=arguments.title,
        notes=dict(arguments.note),
    )
    frame.write(f"wrote {arguments.out} ({max(1, round(arguments.out.stat().st_size / 1e3)):,} kB)")
