"""Reading Python source as a syntax tree, for tests of rules that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement with each dotted name it may load: ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of a dotted name."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == name)


class _Without(ast.NodeTransformer):
    """Leaves out what only type checkers read and, if asked, what runs only when it is called."""

    def __init__(self, functions: bool) -> None:
        self.functions = functions

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:  # noqa: N802  (ast's own name)
        """The other branch of ``if TYPE_CHECKING``."""
        self.generic_visit(node)
        return node.orelse if dotted(node.test).split(".")[-1] == "TYPE_CHECKING" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:  # noqa: N802
        """Nothing where functions are left out."""
        self.generic_visit(node)
        return None if self.functions else node


def imports(text: str) -> set[str]:
    """Names that a module loads when it is imported or run."""
    return {name for _, name in imported(_Without(functions=False).visit(ast.parse(text)))}


def imports_at_the_top(text: str) -> set[str]:
    """Names that a module loads when it is imported."""
    return {name for _, name in imported(_Without(functions=True).visit(ast.parse(text)))}
