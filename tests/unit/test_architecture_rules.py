"""Rules of the architecture: who may import whom, README's map of it, and nothing that nobody uses."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hgpt.testing.syntax import calls, imported, imports, imports_at_the_top

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megatron_hgpt").rglob("*.py"))

FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "testing"),
    ("demo",),
    ("run_stage",),
    ("planner",),
    ("report",),
    ("evaluation",),
    ("inference",),
    ("trainer",),
    ("interruption", "anomaly"),
    ("gradient_audit",),
    ("hooks",),
    ("checkpoint",),
    ("validation", "dry_run"),
    ("engines",),
    ("forward_step", "optim"),
    ("build", "data"),
    ("vl_health", "model_folders"),
    ("model", "convert"),
    ("hlora", "vision"),
    ("backbone",),
    ("text",),
    ("batching", "distributed"),
    ("stages",),
    ("parameters", "config_io", "config_reference"),
    ("files", "config", "cpu_platform", "environment", "ownership"),
    ("safe_yaml", "safe_pickle"),
    ("samples", "errors", "exit_status", "rounding", "bounds"),
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


def import_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Module -> everything it imports when it is loaded or run; of the project's own modules their dotted names."""
    graph = {}
    for module, text in texts.items():
        names = imports(text)
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
    "find_class": "pickle calls it",
    "_shutdown": "torchrun's agent calls it",
    "storage_meta": "torch.distributed.checkpoint calls it",
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
