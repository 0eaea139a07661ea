"""Rules of the code base that no linter knows, checked on the syntax tree of every file of the package."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_hgpt import config
from megatron_hgpt.config import RunConfig

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megatron_hgpt").rglob("*.py"))
ENVIRONMENT_READERS = {"megatron_hgpt/distributed.py", "megatron_hgpt/cpu_platform.py"}
EAGER_TRITON = {"megatron_hgpt/hlora/gate_triton.py"}
"""Kernels need triton to be defined; the module itself is imported lazily."""


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == name)


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
    "name", "shuffle", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "tensorboard", "progress_bar", "model",
    "parallel", "engine", "data", "optimizer", "training", "checkpoint", "logging", "vision", "vq", "vocabulary",
    "hlora", "comprehension", "generation",
}  # fmt: skip
"""Sections, switches, and AdamW's own names."""


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
    overrides = [
        f"{k}={yaml.safe_dump(v, default_flow_style=True).strip()}" for k, v in values.items() if k != "preset"
    ]
    run = load_config(None, [override.removesuffix("\n...") for override in overrides], values["preset"])
    validate(run, 8, check_paths=False)
    assert run.training.stage == "stage3_comprehension"


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


FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "testing"),
    ("demo",),
    ("train",),
    ("planner",),
    ("report",),
    ("evaluation",),
    ("inference",),
    ("trainer",),
    ("gradient_audit",),
    ("hooks",),
    ("checkpoint",),
    ("validation", "dry_run"),
    ("engines",),
    ("forward_step", "optim"),
    ("build", "data"),
    ("vl_health",),
    ("model", "convert"),
    ("hlora", "vision"),
    ("backbone",),
    ("text",),
    ("batching", "distributed"),
    ("stages",),
    ("parameters", "config_io"),
    ("files", "config", "cpu_platform"),
    ("samples", "errors", "rounding"),
)
"""The packages and modules of megatron_hgpt, top floor first, in the order of README's map.

Each imports from itself and from lower floors only; those that share a floor do not know each other.
"""

DOORS = {"megatron_hgpt", "megatron_hgpt.__main__"}
"""They open onto every floor; from the inside only `__version__` is read from them."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, str]:
    """Text of every module of the package by its dotted name."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in PACKAGE}


def unit(module: str) -> str:
    """The package or ground module that a dotted name belongs to."""
    return module.split(".")[1]


def without_type_checking(tree: ast.AST) -> ast.AST:
    """The tree without what only type checkers read."""

    class Remove(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if dotted(node.test).split(".")[-1] == "TYPE_CHECKING" else node

    return Remove().visit(tree)


def import_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Module -> everything it imports when it is loaded or run; of the project's own modules their dotted names."""
    graph = {}
    for module, text in texts.items():
        names = {name for _, name in imported(without_type_checking(ast.parse(text)))}
        graph[module] = {name for name in names if name in texts or not name.startswith("megatron_hgpt.")} - {module}
    return graph


def upward_imports(texts: dict[str, str]) -> list[str]:
    """Imports that do not go down, and units that stand on no floor."""
    level = {name: -i for i, floor in enumerate(FLOORS) for name in floor}
    found = []
    for module, names in import_graph(texts).items():
        if module in DOORS:
            continue
        if unit(module) not in level:
            found.append(f"{module} stands on no floor")
            continue
        for name in names & (texts.keys() - DOORS):
            if unit(name) != unit(module) and level.get(unit(name), 0) >= level[unit(module)]:
                found.append(f"{module} imports {name}")
    return sorted(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The members of one circle; empty without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def module_circle(texts: dict[str, str]) -> list[str]:
    inside = texts.keys() - DOORS
    return circle({module: names & inside for module, names in import_graph(texts).items() if module in inside})


def package_circle(texts: dict[str, str]) -> list[str]:
    inside = texts.keys() - DOORS
    graph: dict[str, set[str]] = {}
    for module, names in import_graph(texts).items():
        if module in inside:
            graph.setdefault(unit(module), set()).update({unit(name) for name in names & inside} - {unit(module)})
    return circle(graph)


def broken_promises(texts: dict[str, str]) -> list[str]:
    """Packages whose docstring does not end in "Must not import: …", or that import what it names."""
    graph, found = import_graph(texts), []
    known = {name for floor in FLOORS for name in floor}
    for package in sorted({unit(module) for module in texts if module.count(".") == 2}):
        lines = (ast.get_docstring(ast.parse(texts[f"megatron_hgpt.{package}"])) or "").splitlines()
        if len(lines) < 3 or not re.fullmatch(r"Must not import: [\w, ]+\.", lines[-1]):
            found.append(f"{package} does not say what it must not import")
            continue
        banned = set(lines[-1].removeprefix("Must not import: ").rstrip(".").split(", "))
        modules = [module for module in texts if module not in DOORS and unit(module) == package]
        reached = {name for module in modules for name in graph[module]}
        reached = {unit(n) if n in texts and n not in DOORS else n.split(".")[0] for n in reached}
        foreign = {name.split(".")[0] for names in graph.values() for name in names} | {"pytest"}
        found += [f"{package} imports {name}" for name in sorted(banned & reached)]
        found += [f"{package} names {name}, which nobody knows" for name in sorted(banned - known - foreign)]
    return found


PLATFORM_CALLS = ("cpu_platform.install_if_needed", "distributed.initialize")


def imports_at_the_top(text: str) -> set[str]:
    """What a module imports while it is imported itself."""
    tree = without_type_checking(ast.parse(text))

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    return {name for _, name in imported(WithoutFunctions().visit(tree))}


def megatron_before_the_platform(texts: dict[str, str]) -> list[str]:
    """The import-order rule of cpu_platform: who prepares the platform must not have imported megatron.core by then."""
    direct = {module: imports_at_the_top(text) for module, text in texts.items()}
    loaded = {module for module, names in direct.items() if any(name.startswith("megatron.") for name in names)}
    while more := {module for module, names in direct.items() if names & loaded} - loaded:
        loaded |= more
    return [
        module
        for module in sorted(loaded)
        for function in ast.walk(ast.parse(texts[module]))
        if isinstance(function, ast.FunctionDef) and any(True for name in PLATFORM_CALLS for _ in calls(function, name))
    ]


def reaches_testing(texts: dict[str, str]) -> list[str]:
    """What is shipped works without what only the tests need."""
    return [
        module
        for module, text in texts.items()
        if not module.startswith("megatron_hgpt.testing")
        and any(name.startswith("megatron_hgpt.testing") for _, name in imported(ast.parse(text)))
    ]


ARCHITECTURE: dict[Callable[[dict[str, str]], list[str]], dict[str, str]] = {
    upward_imports: {"megatron_hgpt.text.x": "def f():\n    from megatron_hgpt.model import healthgpt"},
    module_circle: {
        "megatron_hgpt.text.x": "import megatron_hgpt.text.y",
        "megatron_hgpt.text.y": "def f():\n    from megatron_hgpt.text import x",
    },
    package_circle: {
        "megatron_hgpt.text.x": "def f():\n    import megatron_hgpt.vision.x",
        "megatron_hgpt.vision.x": "from megatron_hgpt.text import x",
    },
    broken_promises: {"megatron_hgpt.vision.x": "from megatron.core import parallel_state"},
    megatron_before_the_platform: {
        "megatron_hgpt.x": "from megatron_hgpt import build\n\ndef f():\n    distributed.initialize(p, 1)"
    },
    reaches_testing: {"tools.x": "from megatron_hgpt.testing.models import f"},
}
"""Rule -> modules that break it."""


@pytest.mark.parametrize("rule", ARCHITECTURE, ids=lambda rule: rule.__name__)
def test_rule_of_the_architecture(rule: Callable[[dict[str, str]], list[str]]) -> None:
    texts = sources()
    if rule is reaches_testing:
        shipped = [*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
        texts |= {module_name(path): path.read_text(encoding="utf-8") for path in shipped}
    assert rule(texts | ARCHITECTURE[rule]), "the rule does not see what it is for"
    assert not rule(texts)


def test_only_type_checkers_may_look_upward() -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_hgpt.model import healthgpt"
    assert not upward_imports(sources() | {"megatron_hgpt.text.x": typed})


def readme_map() -> list[str]:
    """The names in the left column of README's map, from the top: ``text/`` is a package, ``errors`` a module."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n    megatron_hgpt/")[1].splitlines()[1:]
    rows = itertools.takewhile(lambda line: line.startswith("      "), lines)
    return [name for row in rows for name in re.split(r"\s{2,}", row.strip())[0].replace(",", " ").split()]


def test_the_readme_s_map_is_the_tree_and_the_floors() -> None:
    packages = {path.parent.name + "/" for path in (ROOT / "megatron_hgpt").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "megatron_hgpt").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(readme_map()) == sorted(packages | modules)
    assert [name.rstrip("/") for name in readme_map()] == [name for floor in FLOORS for name in floor]


NOT_CALLED_BY_NAME = {
    "_postprocess": "megatron.core's GPTModel calls it",
    "export_backbone": "the way back of load_backbone: tests compare bit by bit",
    "hlora_delta": "the formula that every fast path is tested against",
    "merge": "plain LoRA (one expert) into the weight, for users; refuses more experts",
    "HLoRATEColumnParallelLinear": "Transformer Engine's column without a norm: what the fused one is compared with",
    "write_tiny_qwen2": "a family that the demonstration itself does not use",
}
"""Defined in the package and named nowhere else in what is shipped, with the reason."""


def unused(texts: dict[str, str]) -> set[str]:
    """Functions and classes of the package (without testing/) that nothing shipped names but their own definition."""
    defined, named = set(), set()
    for module, text in texts.items():
        is_product = module.startswith("megatron_hgpt.") and unit(module) != "testing"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if is_product and not node.name.endswith("__"):
                    defined.add(node.name)
            elif isinstance(node, ast.Name):
                named.add(node.id)
            elif isinstance(node, ast.Attribute):
                named.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.update(re.findall(r"\w+$", node.value))  # an entry point, a name in a lazy table
    return defined - named


def test_everything_in_the_package_is_used() -> None:
    shipped = [*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").rglob("*.py"), ROOT / "setup.py"]
    texts = sources() | {module_name(path): path.read_text(encoding="utf-8") for path in shipped}
    assert "called_by_nobody" in unused(texts | {"megatron_hgpt.text.x": "def called_by_nobody(): pass"})
    assert not unused(texts) - NOT_CALLED_BY_NAME.keys()
