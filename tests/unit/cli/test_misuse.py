"""Every command with arguments that make no sense: one line on stderr and exit status 2, before any work."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.cli.commands import COMMANDS
from megatron_hgpt.cli.frame import build_parser
from megatron_hgpt.files import why_not_writable

ABSURD = ("", "x", "-1e9", "-99999999999999999999", "1e23", "99999999999999999999", "nan", "inf", "-inf", "9" * 5000)
"""None of these is a number that an option of any command takes; the last is longer than Python reads."""

OUTPUTS = {
    "preprocess": ["--preset", "tiny", "--input", "records.json", "--output"],
    "evaluate": ["--checkpoint", "run", "--data", "records.json", "--output"],
    "generate": ["--checkpoint", "run", "--question", "CT?", "--draw"],
    "report": ["--run", "run", "--out"],
    "plan": ["--preset", "tiny", "--json"],
    "plan --chart": ["--preset", "tiny", "--chart"],
    "demo": ["--output"],
    "train-vqgan": ["--images", "run", "--output"],
    "train": ["--preset", "tiny", "training.num_steps=1"],
}
"""Command -> arguments up to its output; of train it is an option of the configuration."""


def options_with_values(name: str) -> list[argparse.Action]:
    return [a for a in build_parser(name)._actions if a.option_strings and a.nargs != 0 and a.choices is None]


def numbers(name: str) -> list[str]:
    """The options of a command that take a number: their metavar is one letter."""
    return [a.option_strings[0] for a in options_with_values(name) if a.metavar in ("N", "X", "T", "K", "P")]


NUMBERS = [(name, option) for name in COMMANDS for option in numbers(name)]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command's refusal says."""
    assert main(arguments) == 2, arguments
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and len(err) < 1000, err
    return err


def test_the_table_of_numbers_is_not_empty(record_property: Callable[[str, object], None]) -> None:
    assert len(NUMBERS) > 25
    record_property("refused arguments", len(NUMBERS) * len(ABSURD))


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_that_makes_no_sense_is_refused(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ABSURD:
        assert re.search(rf"argument {option}: .* must be a (whole )?number \(", refused(
            [name, f"{option}={value}"], capsys
        ))  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_number_is_bounded(name: str) -> None:
    """What `int` or `float` alone would read has no bounds."""
    assert [a.option_strings[0] for a in options_with_values(name) if a.type in (int, float)] == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(
    a.option_strings[0] == "--device" for a in options_with_values(name))])  # fmt: skip
def test_a_device_that_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("abc", "cuda:-1", "cuda:9999", "cpu; rm", "", "meta"):
        assert "must be cpu, cuda or cuda:N" in refused([name, f"--device={value}"], capsys)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the inputs that `OUTPUTS` names; two processes' environment variables are gone."""
    (tmp_path / "records.json").write_text("[]")
    (tmp_path / "run" / "step_00000001").mkdir(parents=True)
    for name in ("RANK", "WORLD_SIZE", "NPROC_PER_NODE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"below a file": "records.json/a/b", "of the system": "/proc/no/such", "too long a name": "x" * 300}
    for text in places.values():
        place = text + (".svg" if case == "plan --chart" else ".png" if case == "generate" else "")
        if case == "train":
            assert main(["train", *OUTPUTS[case], f"output_dir={place}"]) == 2
            assert f"output_dir={place} cannot be written" in capsys.readouterr().err
            continue
        message = refused([case.split()[0], *OUTPUTS[case], place], capsys)
        assert "cannot be written: " in message
    assert sorted(path.name for path in here.iterdir()) == ["records.json", "run"]


@pytest.mark.parametrize("name", ["report", "plan"])
def test_a_folder_is_no_file(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run cannot be written: it is a folder" in refused([name, *OUTPUTS[name], "run"], capsys)


def test_where_something_can_be_written(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "a" / "b", is_folder=True) is None
    assert why_not_writable(tmp_path / "a" / "b.txt", is_folder=False) is None
    assert why_not_writable(tmp_path, is_folder=True) is None
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert why_not_writable(tmp_path / "link", is_folder=True) == f"{tmp_path / 'link'} is not a folder"
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert why_not_writable(tmp_path / "closed" / "a", is_folder=True) == "Permission denied"
    assert list(tmp_path.glob(".*")) == []


def test_a_cache_stays_inside_its_dataset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../out", "/tmp/out", "a/b", "..", ".hidden"):
        arguments = ["cache-features", "--preset", "tiny", "--dataset", "run", "--name", name]
        assert f"--name {name} must be the plain name of a sub-folder" in refused(arguments, capsys)
