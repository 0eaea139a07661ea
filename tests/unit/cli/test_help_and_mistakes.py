"""Every command: its help fits a screen, and each kind of mistake is one line on stderr with exit status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.cli.commands import COMMANDS, command_named

ROOT = Path(__file__).parents[3]
LONGER = {"plan": 60}
"""Commands whose options, in groups, may take more than a screen of 40 lines."""

CONFIGURED = {
    "train": [],
    "config": [],
    "plan": [],
    "preprocess": ["--input", "records.json", "--output", "out"],
    "cache-features": [],
}
"""Commands that take --config, --preset and overrides -> what else they need."""
STORED = {
    "generate": ["--question", "CT?", "--checkpoint"],
    "evaluate": ["--data", "records.json", "--output", "out", "--checkpoint"],
}
"""Commands that load a run -> their arguments up to its folder."""

MISTAKES: list[tuple[list[str], str]] = [
    (["trian"], "hgpt: command 'trian' is unknown; did you mean train?"),
    (["xyzzy"], "hgpt: command 'xyzzy' is unknown; there are preprocess, cache-features, verify, train"),
    (["--vresion"], "command '--vresion' is unknown"),
    *[([name, *rest, "--confgi", "x"], "unrecognized arguments: --confgi") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "training.sed=1"], "did you mean training.seed?") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "training.seed=x"], "training.seed='x'") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "seed"], "'seed' is not of the form section.key=value") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "--preset", "tinny"], "'tinny'") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "--config", "nowhere.yaml"], "nowhere.yaml") for name, rest in CONFIGURED.items()],
    *[([name, *rest, "nowhere"], "--checkpoint nowhere is not a folder") for name, rest in STORED.items()],
    *[([name, *rest, "empty"], "--checkpoint empty holds no checkpoint") for name, rest in STORED.items()],
    *[([name, *rest, "empty", "--max-new-tokens", "0"], "'0' must be a whole number (1 to 65536)")
      for name, rest in STORED.items()],
    (["train", "--preset", "tiny", "training.num_steps=1", "model.tokenizer=nowhere"], "nowhere"),
    (["train", "--preset", "tiny", "--dry-run", "training.num_steps=1", "parallel.tensor_model_parallel_size=3",
      "model.vocabulary.pad_to_multiple=192"], "use 1, 2, 4"),
    (["train", "--preset", "tiny", "--dry-run", "training.num_steps=1", "optimizer.lr=-1"], "optimizer.lr"),
    (["train", "--lr", "1e-4", "--tensor-model-parallel-size=2", "--sequence-parallel", "--train-iters", "9"],
     "write optimizer.lr=1e-4 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true "
     "training.num_steps=9\n"),
    (["train", "--save", "runs/a", "--load", "runs/b", "--micro-batch-size", "4"],
     "write checkpoint.directory=runs/a 'checkpoint.init_from=[runs/b]' training.micro_batch_size=4\n"),
    (["report", "--out", "page.html", "--lr", "1"], "unrecognized arguments: --lr"),
    (["train", "records.json"], "hgpt train: records.json is a file; write --config records.json"),
    (["help", "trian"], "did you mean train?"),
    (["preprocess", "--input", "records.json"], "the following arguments are required: --output"),
    (["preprocess", "--preset", "tiny", "--input", "nowhere.json", "--output", "out"], "nowhere.json is not a file"),
    (["preprocess", "--input", "records.json", "--output", "out", "--workers", "many"],
     "'many' must be a whole number (0 to 256)"),
    (["preprocess", "--input", "records.json", "--output", "out"], "model.tokenizer"),
    (["cache-features", "--preset", "tiny"], "no dataset folder: pass --dataset, or set data.train"),
    (["cache-features", "--preset", "tiny", "--dataset", "nowhere"], "nowhere is not a folder"),
    (["cache-features", "--preset", "tiny", "--dataset", "empty", "--depths", "all"], "invalid choice: 'all'"),
    (["verify"], "the following arguments are required: FOLDER"),
    (["verify", "nowhere"], "nowhere is not a folder"),
    (["verify", "empty"], "empty is not a dataset folder (no manifest.json)"),
    (["generate", "--checkpoint", "run"], "the following arguments are required: --question"),
    (["generate", "--checkpoint", "run", "--question", "CT?", "--image", "no.png"], "--image no.png is not a file"),
    (["generate", "--checkpoint", "run", "--question", "CT?", "--image", "records.json"], "records.json"),
    (["generate", "--checkpoint", "run", "--question", "<image> CT?"], "--question has 1 <image> for 0 --image"),
    (["generate", "--checkpoint", "run", "--question", "?", "--draw", "a.txt"], "a.txt: .txt is not a picture's"),
    (["generate", "--checkpoint", "run", "--question", "?", "--draw", "a"], "--draw a: no ending is not a picture's"),
    *[(["generate", "--checkpoint", "run", "--question", "?", name, value], f"{value!r} must be a")
      for name, value in (("--temperature", "-1"), ("--temperature", "inf"), ("--temperature", "nan"),
                          ("--top-k", "-1"), ("--top-p", "0"),
                          ("--top-p", "1.1"), ("--top-p", "x"))],
    (["evaluate", "--checkpoint", "run", "--data", "no.json", "--output", "out"], "--data no.json is not a file"),
    (["evaluate", "--checkpoint", "run", "--data", "records.json", "--output", "records.json/out"],
     "records.json is not a folder; name another place"),
    (["generate", "--checkpoint", "run", "--question", "?", "--draw", "records.json/a.png"],
     "records.json is not a folder; name another place"),
    (["evaluate", "--checkpoint", "run", "--data", "a/x.json", "--data", "b/x.json", "--output", "out"],
     "--data a/x.json and b/x.json would both be split 'x'"),
    (["report", "--out", "records.json/page.html", "--note", "a=b", "--evaluation", "x=evaluation"],
     "records.json is not a folder; name another place"),
    (["report", "--out", "page.html"], "the report would be empty"),
    (["report", "--out", "page.html", "--run", "nowhere"],
     "DataError: nowhere/metrics.jsonl: cannot be read (No such file or directory); give"),
    (["report", "--out", "page.html", "--note", "text"], "'text' is not of the form NAME=VALUE"),
    (["plan"], "name a model: --preset healthgpt_m3"),
    (["plan", "--preset", "healthgpt_l14", "--gpu", "h300"], "--gpu 'h300' is unknown"),
    (["plan", "--preset", "healthgpt_l14", "--chart", "plan.png"], "charts are drawn as .svg"),
    (["plan", "--preset", "healthgpt_l14", "--top", "0"], "'0' must be a whole number (1 to 1000000)"),
    (["plan", "--preset", "healthgpt_l14", "--tensor", "4"], "unrecognized arguments: --tensor"),
    (["plan", "--preset", "healthgpt_l14", "parallel.tensor_model_parallel_size=4"], "cannot shard 40 attention heads"),
    (["plan", "--preset", "healthgpt_l14", "parallel.sequence_parallel=true"], "is not searched"),
    (["config", "--explain", "train"], "did you mean training?"),
    (["config", "--explain", "learning.rate.of.things"], "hgpt config --explain lists them"),
    (["demo", "--backbone", "gpt"], "invalid choice: 'gpt'"),
    (["demo", "training.sed=1"], "did you mean training.seed?"),
    (["demo", "training.seed=x"], "training.seed='x'"),
    (["demo", "--vqgan-steps", "1"], "'1' must be a whole number (2 to 1000000)"),
    (["demo", "--max-vqa", "-1"], "'-1' must be a whole number (0 to 1000000)"),
    (["demo", "--max-images", "few"], "'few' must be a whole number (0 to 1000000)"),
    (["train-vqgan", "--images", "empty"], "the following arguments are required: --output"),
    (["train-vqgan", "--images", "empty", "--output", "out", "--num-codes", "0"],
     "'0' must be a whole number (1 to 65536)"),
    (["train-vqgan", "--images", "empty", "--output", "out", "--resolution", "20"], "resolution=20 must be a positive"),
    (["train-vqgan", "--images", "nowhere", "--output", "out"], "nowhere does not exist; name a folder"),
    (["train-vqgan", "--images", "empty", "--output", "out"], "no picture in empty"),
]  # fmt: skip

EVERY_CASE = """
import json, os, sys
from megatron_hgpt.cli import main
results = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    saved = os.dup(1), os.dup(2)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
    status = main(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(saved[0], 1), os.dup2(saved[1], 2)
    results.append([status, open("stdout").read(), open("stderr").read()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """[status, stdout, stderr] of every mistake: one process of its own, with real file descriptors and logging."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "run" / "step_00000001").mkdir(parents=True)
    (folder / "records.json").write_text("[]")
    summary = {"vqa": [], "images": []}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps({"split": "x", "summary": summary, **summary}))
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CASE, json.dumps([arguments for arguments, _ in MISTAKES])],
        cwd=folder, env=_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def _environment() -> dict[str, str]:
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NPROC_PER_NODE", "PYTHONWARNINGS")
    return {**{k: v for k, v in os.environ.items() if k not in torchrun}, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("case", range(len(MISTAKES)), ids=lambda case: " ".join(MISTAKES[case][0]))
def test_a_mistake_is_one_line_and_status_2(case: int, outcomes: list[Any]) -> None:
    status, out, err = outcomes[case]
    assert status == 2
    assert out == ""
    # One line; where a configuration has several mistakes, one for their number and one for each.
    several = re.match(r"ConfigError: (\d+) problems\n", err)
    assert err.count("\n") == (1 + int(several[1]) if several else 1) and err.endswith("\n"), err
    assert MISTAKES[case][1] in err
    assert err.split(":")[0] in ("ConfigError", "DataError", "CheckpointError", "UsageError", "FileError")


def test_every_command_is_in_the_table_of_mistakes() -> None:
    assert {*COMMANDS} <= {arguments[0] for arguments, _ in MISTAKES}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: hgpt {name}")
    assert len(lines) <= LONGER.get(name, 40)
    assert max(map(len, lines)) <= 100
    assert f"hgpt {name}" in "\n".join(lines[2:]), "an example"
    assert "\n" not in command_named(name).HELP
    assert "tools/" not in command_named(name).EXAMPLES


def test_the_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 100
        assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)
    assert main(["help", "train"]) == 0
    assert capsys.readouterr().out.startswith("usage: hgpt train ")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron_hgpt ")


def test_help_and_wrong_keys_do_not_import_torch() -> None:
    code = (
        "import sys; from megatron_hgpt.cli import main; main(['--help']); main(['train', '--help']); "
        "main(['plan', 'training.sed=1']); main(['config', '--explain']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_entry_point_and_the_module_are_the_same_command() -> None:
    assert '"hgpt = megatron_hgpt.cli:main"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hgpt", "--version"], env=_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("tool", "command"),
    [("preprocess_vl_health", "preprocess"), ("cache_features", "cache-features"), ("evaluate", "evaluate"),
     ("generate", "generate"), ("make_report", "report"), ("plan", "plan"), ("run_demo", "demo"),
     ("train_vqgan", "train-vqgan")],
)  # fmt: skip
def test_a_tool_is_its_command(tool: str, command: str) -> None:
    path = ROOT / "tools" / f"{tool}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 25
    done = subprocess.run([sys.executable, path, "--help"], env=_environment(), capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: hgpt {command} "), done.stderr
