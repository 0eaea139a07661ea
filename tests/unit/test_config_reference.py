"""``hgpt config --explain`` and docs/options.md say of every option what config.py says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import _all_names, load_config
from megatron_hgpt.config_reference import describe_type, describe_value, explain, markdown, sections
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model_folders import load_resolved

ROOT = Path(__file__).parents[2]


class Positive:
    """A bound as config.py's."""

    def __str__(self) -> str:
        return "above 0"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "int"),
        (str | None, "text or null"),
        (bool, "true or false"),
        (list[str], "list of text"),
        (dict[str, float], "mapping of name to float"),
        (dict[str, Any], "mapping of name to any value"),
        (Literal["rows", "full"], "one of rows, full"),
        (Literal["selective", "full"] | None, "one of selective, full, or null"),
        (Annotated[int, Positive()], "int, above 0"),
        (Annotated[float, Positive()] | None, "float, above 0, or null"),
        (Annotated[float | None, Positive()], "float or null, above 0"),
        (list[Annotated[int, Positive()]], "list of int, above 0"),
    ],
)
def test_types_in_words(kind: Any, text: str) -> None:
    assert describe_type(kind) == text


def test_defaults_are_yaml() -> None:
    assert [describe_value(value) for value in (None, True, 1e-8, 0.5, [], {}, "run")] == [
        "null", "true", "1e-08", "0.5", "[]", "{}", "run"
    ]  # fmt: skip


def test_every_option_is_explained_and_may_be_set() -> None:
    """The names are those that overrides take."""
    options = [option.name for section in sections() for option in section.options]
    names = {section.name for section in sections()}
    assert {*options, *names} - {""} == set(_all_names(RunConfig))
    for option in (option for section in sections() for option in section.options):
        value: Any = load_config(overrides=[f"{option.name}={option.default}"])
        for part in option.name.split("."):
            value = getattr(value, part)
        assert describe_value(value) == option.default


def test_one_option_a_section_and_a_near_miss() -> None:
    assert explain("checkpoint.save_interval_steps").splitlines() == [
        "checkpoint.save_interval_steps: int, 1 to 1000000000; default 500; optimizer steps",
        "    Optimizer steps between checkpoints; the last step is always saved.",
    ]
    section = explain("model.hlora")
    assert "model.hlora.generation.lora_rank: int" in section and "default 256" in section
    assert "training." not in section
    assert max(map(len, explain().splitlines())) <= 100
    for key, nearest in (("train", "training"), ("optimizer.lrr", "optimizer.lr"), ("sed", "training.seed")):
        with pytest.raises(ConfigError, match=rf"did you mean {nearest}\?"):
            explain(key)


def test_units_come_from_the_name_or_the_docstring() -> None:
    units = {option.name: option.unit for section in sections() for option in section.options}
    assert units["training.num_steps"] == units["logging.interval_steps"] == "optimizer steps"
    assert units["model.max_seq_length"] == "tokens"
    assert units["parallel.context_parallel_size"] == "ranks"
    assert units["optimizer.warmup_ratio"] == "share, 0 to 1"
    assert units["data.num_workers"] == "threads"
    assert units["data.train"] == units["training.stage"] == ""


def test_the_page_of_all_options_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == markdown(), "write it again: python -m megatron_hgpt config --markdown > docs/options.md"
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == page
    assert len([line for line in page.splitlines() if line.startswith("| `")]) > 70


def test_the_resolved_configuration_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "--preset", "tiny", "training.stage=stage2"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "resolved.yaml") == load_resolved(preset="tiny", overrides=["training.stage=stage2"])


def test_every_key_that_the_page_for_newcomers_names_exists() -> None:
    """docs/coming_from.md: flags of Megatron-LM and LLaVA in the left column, keys in the right."""
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and "--" in line]
    keys = [key for cell in cells for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", cell)]
    assert len(keys) > 60
    assert not set(keys) - set(_all_names(RunConfig))
