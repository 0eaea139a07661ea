"""What every command shares: choosing it, its options, configuration and overrides, logging, and one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_hgpt import __version__
from megatron_hgpt.bounds import Bound
from megatron_hgpt.cli.commands import COMMANDS, Command, command_named
from megatron_hgpt.cli.library_messages import silence_known
from megatron_hgpt.environment import (
    error_messages_of_this_machine,
    rank_from_environment,
    use_one_hardware_queue,
    write_error_file,
)
from megatron_hgpt.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    HealthGPTError,
    HungError,
    did_you_mean,
    shown,
)
from megatron_hgpt.exit_status import ExitStatus
from megatron_hgpt.files import why_not_writable
from megatron_hgpt.rounding import plural

if TYPE_CHECKING:
    from megatron_hgpt.config import RunConfig

RANK_ERROR_DELAY_S = 30.0
"""Seconds that another process than the first holds its error back. Mistakes are mostly the same everywhere: rank 0
says them, and its end makes torchrun end the others. What nobody has said until then is an error of its own."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of writing that name no file."""
_REFUSED = (
    *_FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
)  # fmt: skip
"""What the system refuses the same way every time. Of others (EIO, ESTALE, ETIMEDOUT) a restart may be the end."""


class UsageError(HealthGPTError):
    """The command line itself is wrong: an unknown command or option, a missing or malformed argument."""


class FileError(HealthGPTError):
    """The system refuses a file or a folder: no permission, no room, a file where a folder should be."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are exceptions with the nearest option's name, and not the usage text."""

    words: Sequence[str] = ()
    """What is being parsed."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        hint = ""
        unknown = [word for word in message.split() if word.startswith("-")]
        if message.startswith("unrecognized arguments: ") and unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            if any(action.dest == "overrides" for action in self._actions):
                from megatron_hgpt.cli.megatron_options import as_overrides

                overrides = as_overrides(unknown, self.words)
                hint = f"; write {' '.join(overrides)}" if overrides else hint
        raise UsageError(f"{self.prog}: {message}{hint or f'; see {self.prog} --help'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hgpt`` and ``python -m megatron_hgpt``: runs the command that the first argument names.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        Exit status: 0, what the command says, or 2 after a user's mistake, which is one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["help"] and len(words) > 1:
            return run_command(words[1], ["--help"])
        if not words or words[0] in ("-h", "--help", "help"):
            sys.stdout.write(usage())
            return 0
        if words[0] == "--version":
            sys.stdout.write(f"megatron_hgpt {__version__}\n")
            return 0
        return run_command(words[0], words[1:])
    except HealthGPTError as error:
        return report_error(error, verbose="--verbose" in words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hgpt config | head`: the reader has gone, and there is nothing left to flush to
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except OSError as error:
        if error.errno not in (_FULL if error.filename is None else _REFUSED):
            raise
        name = "a file" if error.filename is None else error.filename
        problem = FileError(f"cannot read or write {name}: {error.strerror}")
        problem.__cause__ = error
        return report_error(problem, verbose="--verbose" in words)


def usage() -> str:
    """The text of ``hgpt --help``: every command with its line."""
    lines = [f"  {name:<16}{command_named(name).HELP}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: hgpt COMMAND [options] [section.key=value …]",
            "",
            "Train HealthGPT, a medical vision-language model that reads and draws, on Megatron-Core.",
            "",
            "commands",
            *lines,
            "",
            "hgpt COMMAND --help    options and examples of a command",
            "hgpt config --explain  every key that a configuration file and key=value may set",
            "hgpt --version         the version",
            "",
        ]
    )


def build_parser(name: str) -> Parser:
    """The parser of a command with the options that all have."""
    command = command_named(name)
    parser = Parser(
        prog=f"hgpt {name}",
        description=command.HELP,
        epilog=_epilog(command),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="debug messages, and the traceback of an error")
    required = [
        f"{action.option_strings[0]} {action.metavar}{' …' if action.nargs == '+' else ''}"
        for action in parser._actions
        if action.required and action.option_strings
    ]
    overrides = ["[key=value …]"] if any(action.dest == "overrides" for action in parser._actions) else []
    parser.usage = " ".join([f"hgpt {name}", *required, "[options]", *overrides])
    return parser


def _epilog(command: Command) -> str:
    """What stands below the options: the notes, wrapped, and the examples."""
    notes = [*textwrap.wrap(" ".join(command.NOTES.split()), 79), ""] if command.NOTES.strip() else []
    return "\n".join([*notes, "examples:", *(f"  {line}" for line in command.EXAMPLES.strip().splitlines())])


def run_command(name: str, argv: Sequence[str]) -> int:
    """Parse the arguments of a command and run it.

    Raises:
        UsageError: no such command, or arguments that it does not have.
        HealthGPTError: the command's own.
    """
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError(f"hgpt: command {name!r} is unknown{hint}")
    parser = build_parser(name)
    parser.words = argv
    try:
        arguments = parser.parse_intermixed_args(list(argv))
    except SystemExit as ended:  # --help has printed its text
        return int(ended.code or 0)
    if hasattr(arguments, "config"):
        for word in arguments.overrides:
            if "=" not in word and Path(word).is_file():
                raise UsageError(f"hgpt {name}: {word} is a file; write --config {word}")
    arguments.argv = list(argv)
    command = command_named(name)
    silence_known()
    use_one_hardware_queue()
    configure_logging(logging.DEBUG if arguments.verbose else getattr(command, "LOG_LEVEL", logging.INFO))
    return command.run(arguments) or 0


class ConsoleFormatter(logging.Formatter):
    """``HH:MM:SS message``, and ``warning:`` or ``error:`` before it where it is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's own name)
        """The line of a record."""
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def configure_logging(level: int) -> None:
    """Log to stderr from `level` up, on other ranks than the first from ERROR up; stdout is for results alone."""
    console = logging.StreamHandler()
    console.setFormatter(ConsoleFormatter())
    logging.basicConfig(handlers=[console])
    logging.getLogger("megatron_hgpt").setLevel(level if rank_from_environment() == 0 else max(level, logging.ERROR))


def report_error(error: HealthGPTError, *, verbose: bool = False) -> int:
    """Say a user's mistake in one line on stderr, once for all processes of a group; returns the exit status.

    Several mistakes in one configuration (`errors.raise_problems`) have a line each.
    """
    try:
        rank = rank_from_environment()
    except ConfigError:  # the error itself, then
        rank = 0
    text = str(error).rstrip()
    if not re.match(r"\d+ problems\n", text):
        text = " ".join(text.split())
    said = f"{type(error).__name__}: {text}"
    status = _status_of(error)
    if rank and not isinstance(error, HungError) and _is_said_by_another(said):
        return 0  # nothing to add to torchrun's list of failures
    if verbose:
        traceback.print_exception(error)
    message = f"{f'rank {rank}: ' if rank else ''}{said}"
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    # A torchrun that the user started reports every failure in some thirty lines; these then end with the message.
    write_error_file(message)
    return status


def _is_said_by_another(said: str) -> bool:
    """Wait until torchrun ends this process or `RANK_ERROR_DELAY_S` is over; whether another has said this by then."""

    def wake(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise InterruptedError

    signal.signal(signal.SIGTERM, wake)
    with contextlib.suppress(InterruptedError):
        time.sleep(RANK_ERROR_DELAY_S)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the line and the status come first
    return any(message.endswith(said) for message in error_messages_of_this_machine())


def _status_of(error: HealthGPTError) -> ExitStatus:
    if isinstance(error, DivergedError):
        return ExitStatus.DIVERGED
    return ExitStatus.HUNG if isinstance(error, HungError) else ExitStatus.USER_ERROR


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--preset`` and overrides: a run's configuration, for `load`."""
    from megatron_hgpt.config_io import preset_names

    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE", help="YAML run configuration")
    group.add_argument("--preset", metavar="NAME", help=f"a model beneath the file: {', '.join(preset_names())}")
    group.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, as training.seed=7")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Overrides of a configuration that a checkpoint brings along."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the stored one, as model.backbone=FOLDER"
    )


def load(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the options of `add_configuration` name, with its model's folders read.

    Raises:
        ConfigError: all that is wrong in it at once, or a preset or file that is not there.
    """
    from megatron_hgpt.model_folders import load_resolved

    return load_resolved(arguments.config, arguments.overrides, arguments.preset)


def require_file(path: Path, option: str) -> None:
    """Refuse a missing input at once, before a model is loaded for it.

    Raises:
        ConfigError: there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{option} {path} is not a file; name one that exists")


def require_folder(folder: Path, option: str) -> None:
    """As `require_file`, for a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{option} {folder} is not a folder; name one that exists")


def require_run(folder: Path) -> None:
    """Refuse what `load_run` would, before torch is imported for it.

    Raises:
        ConfigError: the folder is not there.
        CheckpointError: it holds no checkpoint.
    """
    require_folder(folder, "--checkpoint")
    if not (folder.name.startswith("step_") or any(folder.glob("step_*")) or any(folder.glob("checkpoints/step_*"))):
        raise CheckpointError(f"--checkpoint {folder} holds no checkpoint (step_* folder); name a run's output_dir")


def write(*parts: Any) -> None:
    """A line of a command's result on stdout, now."""
    sys.stdout.write(" ".join(str(part) for part in parts) + "\n")
    sys.stdout.flush()


def pair(text: str) -> tuple[str, str]:
    """The type of a NAME=VALUE option."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def number(kind: type[int] | type[float], *bounds: Bound) -> Callable[[str], int | float]:
    """The type of an option that is a number within bounds."""
    what = f"a {'whole ' if kind is int else ''}number ({', '.join(map(str, bounds))})"

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if all(bound.holds(value) for bound in bounds):
                return value
        raise argparse.ArgumentTypeError(f"{shown(text)} must be {what}")

    return parse


def device(text: str) -> str:
    """The type of an option that is a device: cpu, cuda, cuda:3."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be cpu, cuda or cuda:N")
    return text


def require_device(name: str | None) -> None:
    """Refuse a GPU that this machine does not have; None and cpu are no question.

    Raises:
        ConfigError: it is not here.
    """
    if name is None or name == "cpu":
        return
    import torch

    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise ConfigError(f"--device {name}: this machine has {plural(count, 'GPU')}; use cpu, or one of them")


def require_writable(path: Path | None, option: str, *, is_folder: bool = False) -> None:
    """Refuse an output that cannot be written, before any work for it; None is no output.

    Raises:
        ConfigError: it cannot.
    """
    if path is not None and (problem := why_not_writable(path, is_folder=is_folder)):
        raise ConfigError(f"{option} {path} cannot be written: {problem}; name another place")
