"""Import graphs of the distributions, read with `ast`: every import counts, type-only ones too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: package -> folder of its source
SOURCES = {
    "qcore": ROOT / "core/src/qcore",
    "qcore_qwen35": ROOT / "qwen35_plugin/src/qcore_qwen35",
    "qcore_qwen36": ROOT / "qwen36_plugin/src/qcore_qwen36",
    "qcore_multimodal": ROOT / "multimodal_plugin/src/qcore_multimodal",
}


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join((package, *parts))] = path
    return found


def imported(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every ``from module import name``; name is empty for ``import module``."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                base = ".".join((*above, base)) if base else ".".join(above)
            yield from ((base, alias.name) for alias in node.names)


def imports(folder: Path, package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports."""
    known = modules(folder, package)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        pairs = imported(module, path)
        targets = (f"{base}.{name}" if f"{base}.{name}" in known else base for base, name in pairs)
        graph[module] = {target for target in targets if target in known and target != module}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan), and self-imports."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group: list[str] = []
            while node not in group:
                group.append(stack.pop())
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)
