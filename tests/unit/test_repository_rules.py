"""Rules of the code base that no linter knows, checked on the syntax tree of every file of the package."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_hgpt import config
from megatron_hgpt.config import RunConfig
from megatron_hgpt.testing.syntax import calls, dotted, imported

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megatron_hgpt").rglob("*.py"))
ENVIRONMENT_READERS = {
    "megatron_hgpt/distributed.py",
    "megatron_hgpt/environment.py",
    "megatron_hgpt/cpu_platform.py",
    "megatron_hgpt/hooks/external.py",  # trackers read theirs when they are imported
}
EAGER_TRITON = {"megatron_hgpt/hlora/gate_triton.py"}
"""Kernels need triton to be defined; the module itself is imported lazily."""


def keyword(call: ast.Call, name: str) -> object:
    return next((getattr(k.value, "value", "?") for k in call.keywords if k.arg == name), None)


def no_print(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """The package logs; tools/ print."""
    yield from calls(tree, "print")


def no_global_statement(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """State travels in arguments."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Global))


def no_environment(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """Only the modules that deal with torchrun and the platform look at the environment."""
    if path in ENVIRONMENT_READERS or path.startswith("megatron_hgpt/testing/"):
        return
    yield from (n for n in ast.walk(tree) if dotted(n) in ("os.environ", "os.getenv", "os.putenv"))
    yield from (n for n, name in imported(tree) if name in ("os.environ", "os.getenv"))


def no_foreign_imports(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """megatron.training is not in every wheel; apex is reached through megatron.core only."""
    banned = re.compile(r"(megatron\.training|megatron\.legacy|apex)(\.|$)")
    yield from (node for node, name in imported(tree) if banned.match(name))


def no_lenient_loading(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """A wrong prefix with strict=False silently loads nothing."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and dotted(node.func).endswith("load_state_dict")
            and keyword(node, "strict") is False
        ):
            yield node


def safe_unpickling(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """A pickle may run code, unless torch reads it with weights_only=True; YAML and NumPy likewise."""
    yield from (call for call in calls(tree, "torch.load") if keyword(call, "weights_only") is not True)
    yield from (call for call in calls(tree, "np.load") if keyword(call, "allow_pickle") is True)
    yield from calls(tree, "yaml.load")
    yield from calls(tree, "yaml.unsafe_load")
    for module in ("pickle", "dill", "cloudpickle"):
        yield from (node for node, name in imported(tree) if name in (f"{module}.load", f"{module}.loads"))
        yield from (call for name in ("load", "loads", "Unpickler") for call in calls(tree, f"{module}.{name}"))


def safe_checkpoints(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """Loaders that unpickle what lies in a checkpoint folder; `megatron_hgpt.checkpoint.reading` takes their place."""
    if path.startswith("megatron_hgpt/testing/"):  # writes the formats of earlier versions
        return
    for module, names in {
        "torch.distributed.checkpoint": ("load", "load_state_dict", "FileSystemReader", "DefaultLoadPlanner"),
        "megatron.core": ("dist_checkpointing",),
        "megatron.core.dist_checkpointing": ("load", "load_plain_tensors", "load_common_state_dict"),
    }.items():
        yield from (node for node, name in imported(tree) if name in {f"{module}.{one}" for one in names})


READS_PICKLES = ("megatron_hgpt/safe_pickle.py", "megatron_hgpt/checkpoint/metadata_file.py")
"""The modules that know how to read one without running it."""


def pickle_is_read_in_few_places(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """Who reads pickles reads them by an allow-list, and says so at its head."""
    if path not in READS_PICKLES and not path.startswith("megatron_hgpt/testing/"):  # which plants them
        yield from (node for node, name in imported(tree) if name.split(".")[0] in ("pickle", "dill", "cloudpickle"))


def no_code_from_outside(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """A model's folder brings no code, and nothing is downloaded (the demo reads models of installed packages)."""
    yield from (call for name in ("eval", "exec", "__import__") for call in calls(tree, name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func).endswith("from_pretrained"):
            is_local = path.startswith("megatron_hgpt/demo/") or keyword(node, "local_files_only") is True
            if keyword(node, "trust_remote_code") is True or not is_local:
                yield node


def nothing_unfinished(tree: ast.AST, path: str) -> Iterator[ast.AST]:
    """No stubs."""
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "NotImplementedError")


Rule = Callable[[ast.AST, str], Iterator[ast.AST]]
BREAKS: dict[Rule, str] = {
    no_print: "print(1)",
    no_global_statement: "def f():\n global x",
    no_environment: "import os\nos.environ['A']",
    no_foreign_imports: "from megatron import training",
    no_lenient_loading: "model.inner.load_state_dict(s, strict=False)",
    safe_unpickling: "import torch\ntorch.load(p, weights_only=False)",
    safe_checkpoints: "from torch.distributed.checkpoint import FileSystemReader",
    pickle_is_read_in_few_places: "import pickle",
    no_code_from_outside: "AutoModel.from_pretrained(folder)",
    nothing_unfinished: "raise NotImplementedError",
}
"""Rule -> code that breaks it."""


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_rule_of_the_package(rule: Rule) -> None:
    assert list(rule(ast.parse(BREAKS[rule]), "x.py")), "the rule does not see what it is for"
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"
        for path in PACKAGE
        for node in rule(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)))
    ]
    assert not found, f"{rule.__name__} ({rule.__doc__}): {found}"


def test_triton_is_imported_at_the_top_in_one_module_only() -> None:
    eager = {
        str(path.relative_to(ROOT))
        for path in PACKAGE
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for _, name in imported(ast.Module([node], []))
        if isinstance(node, ast.Import | ast.ImportFrom) and name.split(".")[0] == "triton"
    }
    assert eager == EAGER_TRITON


@pytest.mark.parametrize("path", [*PACKAGE, *sorted((ROOT / "tools").glob("*.py"))], ids=lambda path: path.stem)
def test_sizes(path: Path) -> None:
    """Files below 400 lines and functions below 80: what one can keep in mind."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 400
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 80
    ]
    assert not long


def config_classes(cls: type = RunConfig) -> Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                yield from config_classes(typing.cast(type, option))


SELF_EXPLANATORY = {
    "model", "parallel", "engine", "data", "optimizer", "training", "checkpoint", "logging", "vision", "vq",
    "vocabulary", "hlora", "comprehension", "generation", "anomaly", "timeouts", "launch",
}  # fmt: skip
"""Sections."""


@pytest.mark.parametrize(
    "cls", sorted(set(config_classes()), key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__
)
def test_every_field_of_the_configuration_says_its_unit(cls: type) -> None:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    documented = {
        field.target.id
        for field, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }
    silent = {field.name for field in dataclasses.fields(cls)} - documented - SELF_EXPLANATORY
    assert not silent
    assert inspect.getdoc(cls)
    assert cls.__module__ == config.__name__


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_readme_s_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("make demo") for line in lines[:40])
    assert any(line.startswith("make test") for line in lines[:40])
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile(), re.M))
    assert set(re.findall(r"`make ([a-z0-9-]+)`", readme)) <= targets
    assert set(re.findall(r"^\.PHONY: (.*)$", makefile(), re.M)[0].split()) <= targets
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
        for path in re.findall(r"(?:tools|examples|megatron_hgpt)/[\w/]+\.(?:py|sh|sbatch|yaml)", text):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"


def test_the_readme_s_configuration_is_valid() -> None:
    from megatron_hgpt.config_io import load_config
    from megatron_hgpt.validation import validate

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    values = yaml.safe_load(block)
    overrides = [f"{k}={yaml.safe_dump(v, default_flow_style=True).strip()}" for k, v in values.items()]
    # The sizes that a user's folders would say are the preset's here.
    run = load_config(None, [override.removesuffix("\n...") for override in overrides], "healthgpt_m3")
    validate(run, 8, check_paths=False)
    assert run.training.stage == "stage1_joint" and not run.checkpoint.init_from


def test_the_continuous_integration_ends_with_pytest_s_own_line() -> None:
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert steps[0] == "set -euo pipefail"
    assert steps[-2:] == ["make lint", "make test"]
    recipe = makefile().split("\ntest: venv\n")[1].split("\n\n")[0].splitlines()
    assert "-m pytest" in recipe[-1]
    assert "TIMED" not in "".join(recipe)  # it would print a line of its own at the end


def test_apex_is_never_a_requirement() -> None:
    """PyPI's apex is an unrelated package."""
    for name in ("setup.py", "constraints.txt"):
        assert not re.search(r"[\"'\s]apex\b", (ROOT / name).read_text(encoding="utf-8"))
