"""``hgpt config``: the resolved configuration, and what every option means."""

from __future__ import annotations

import argparse

from megatron_hgpt.cli import frame

HELP = "print the resolved configuration, or explain its options"
EXAMPLES = """
hgpt config --config my_run.yaml       presets, bases and overrides resolved
hgpt config --preset healthgpt_m3 training.stage=stage2
hgpt config --explain                  every option
hgpt config --explain training         a section
hgpt config --explain optimizer.lr     one option
hgpt config --markdown > docs/options.md
"""
NOTES = """"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is printed."""
    frame.add_configuration(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--explain", nargs="?", const="", metavar="KEY", help="type, default, unit, meaning of options")
    what.add_argument("--markdown", action="store_true", help="all options as docs/options.md has them")


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    from megatron_hgpt import config_reference

    if arguments.markdown:
        frame.write(config_reference.markdown().rstrip())
    elif arguments.explain is not None:
        frame.write(config_reference.explain(arguments.explain).rstrip())
    else:
        from megatron_hgpt.config_io import dump

        frame.write(dump(frame.load(arguments)).rstrip())
